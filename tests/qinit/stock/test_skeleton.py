def test_two_of_one_configuration_are_the_same_and_others_are_not(skeleton):
    one, again, other = skeleton("llama"), skeleton("llama"), skeleton("llama_head")
    assert one == again
    assert hash(one) == hash(again)
    assert one.checkpoint.directory != again.checkpoint.directory
    assert one != other


def test_it_is_built_without_memory(skeleton):
    model = skeleton("llama").build()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(buffer.is_meta for buffer in model.buffers())
    assert not any(buffer.is_meta for buffer in skeleton("llama").build(include_buffers=False).buffers())

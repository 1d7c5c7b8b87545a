from qinit.text.passages import passages

SENTENCES = [f"This is sentence number {i} of a long text." for i in range(400)]
TEXT = " ".join(SENTENCES)


def test_they_are_whole_sentences_of_all_lengths():
    found = passages([TEXT], 128, 10**6, seed=0)
    assert " ".join(found) == TEXT
    assert all(passage.startswith("This is") and passage.endswith("text.") for passage in found)
    sizes = [len(passage) / 4 for passage in found]
    assert min(sizes[:-1]) >= 16
    assert max(sizes) < 128 + 16
    short, middle, long = (sum(low <= size < 2 * low for size in sizes) for low in (16, 32, 64))
    assert min(short, middle, long) >= 5


def test_so_many_tokens_are_drawn_evenly_and_the_seed_decides():
    found = passages([TEXT, TEXT], 128, 1000, seed=1)
    assert 1000 <= sum(map(len, found)) / 4 <= 1000 + 128 + 16
    assert found == passages([TEXT, TEXT], 128, 1000, seed=1)
    assert found != passages([TEXT, TEXT], 128, 1000, seed=2)
    numbers = [int(passage.split("number ")[1].split()[0]) for passage in found]
    assert max(numbers) > 200 > min(numbers)


def test_a_text_without_sentences_is_one_passage():
    assert passages(["x" * 5000, " \n "], 128, 10**6, seed=0) == ["x" * 5000]

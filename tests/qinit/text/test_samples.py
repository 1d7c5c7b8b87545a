from tests.helpers import padded, random_samples


def test_padding_is_not_counted():
    assert random_samples(7, 12).count == 84
    assert padded(random_samples(3, 12), [12, 5, 1]).count == 18


def test_the_shortest_come_first_and_keep_their_numbers():
    samples = padded(random_samples(4, 12), [12, 5, 12, 1])
    found = samples.shortest_first()
    assert found.mask.sum(1).tolist() == [1, 5, 12, 12]
    assert [found.number(place) for place in range(4)] == [3, 1, 0, 2]
    assert found.tokens[1].tolist() == samples.tokens[1].tolist()
    assert samples.number(3) == 3
    whole = random_samples(3, 12)
    assert whole.shortest_first() is whole

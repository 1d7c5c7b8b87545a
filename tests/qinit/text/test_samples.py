from tests.helpers import padded, random_samples


def test_padding_is_not_counted():
    assert random_samples(7, 12).count == 84
    assert padded(random_samples(3, 12), [12, 5, 1]).count == 18

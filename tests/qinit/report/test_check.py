from qinit.report.check import check_words

ROW = {
    "text": "a text",
    "tokens": 2044,
    "kl": 4.77,
    "top1_agreement": 0.11,
    "perplexity": 3000.5,
    "reference_perplexity": 30.25,
}


def test_the_figures_in_words():
    assert check_words(ROW) == {
        "KL from the original": "4.7700 nats per token",
        "same top token": "11.0 %",
        "perplexity": "3000.500, original 30.250",
        "measured on": "2044 tokens of a text",
    }

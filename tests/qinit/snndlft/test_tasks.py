import pytest

from qinit.errors import CalibrationError, DatasetError, RecipeError
from qinit.snndlft.tasks import Data, read_task
from tests.models import words


def data(train, **options):
    values = {"validation": None, "columns": (), "label": None, "metric": "accuracy", "length": 8, "seed": 0}
    return Data(train, **{**values, **options})


def text(place, count):
    file = place / "a.txt"
    file.write_text(words(*(4 + i % 200 for i in range(count))))
    return file


def labelled(place, rows=40):
    file = place / "a.csv"
    file.write_text("text,kind\n" + "".join(f"{words(4 + i, 5 + i % 3)},{'ab'[i % 2]}\n" for i in range(rows)))
    return file


def test_a_text_becomes_windows_and_the_last_tenth_is_held_out(reader, tmp_path):
    task = read_task(data(text(tmp_path, 8 * 20 + 3)), reader)
    assert task.train.shape == (18, 8)
    assert task.held_out.tolist() == [[4 + i for i in range(8 * at, 8 * at + 8)] for at in (18, 19)]
    batch = task.collate(task.examples[:2])
    assert batch["labels"].equal(batch["input_ids"])


def test_labelled_rows_are_held_out_by_the_seed_alone(reader, tmp_path):
    file = labelled(tmp_path)
    task, again, other = (
        read_task(data(file, columns=("text",), label="kind", seed=seed), reader) for seed in (0, 0, 1)
    )
    assert (len(task.train.labels), len(task.held_out.labels)) == (36, 4)
    assert task.held_out == again.held_out != other.held_out
    assert not set(task.train.texts) & set(task.held_out.texts)
    batch = task.collate(task.examples[:3])
    assert batch["labels"].tolist() == task.train.labels[:3]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 2)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda place: text(place, 7), {}, CalibrationError, "has 7 tokens, fewer than one window of 8"),
        (lambda place: text(place, 8), {}, CalibrationError, "so that none can be held out"),
        (labelled, {"columns": ("text",), "label": "kind", "metric": "bleu"}, RecipeError, "metric: unknown 'bleu'"),
        (lambda place: labelled(place, 4), {"columns": ("text",), "label": "text"}, DatasetError, "are no classes"),
    ],
)
def test_what_cannot_be_learned_from_is_said(reader, tmp_path, make, options, error, message):
    with pytest.raises(error, match=message):
        read_task(data(make(tmp_path), **options), reader)

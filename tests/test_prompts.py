import gzip
import hashlib
import io
import json
import logging
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from ddinfer.errors import InputError
from ddinfer.prompts.files import prompt_from_fields, read_prompts, read_requests

DATA = Path(__file__).parent / "data"


@pytest.fixture
def file(tmp_path):
    """Write bytes or text to a file of a given name → its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def texts(path, **options):
    return [p.fields["prompt"] for p in read_prompts(path, **options)]


def rows(path, **options):
    return [dict(p.fields) for p in read_prompts(path, **options)]


# --- txt ---------------------------------------------------------------------------------------


def test_txt_lines_are_literal(file):
    lines = [
        'a "dog"',
        "  edges  ",
        "# no comment",
        "a, b | {c} --x",
        "tab\there",
        "é 🐶 \u2028 \x0b",
    ]
    assert texts(file("p.txt", "\n".join(lines))) == lines


def test_a_last_line_end_makes_no_prompt(file):
    assert texts(file("p.txt", "a\nb\n")) == ["a", "b"]


def test_crlf_and_a_byte_order_mark_are_no_part_of_a_prompt(file):
    assert texts(file("p.txt", b"\xef\xbb\xbfa\r\nb \r\n")) == ["a", "b "]


def test_blank_lines_are_skipped_with_a_note_and_lines_keep_their_numbers(file, caplog):
    path = file("p.txt", "a\n\n  \nb\n")
    with caplog.at_level(logging.WARNING):
        prompts = read_prompts(path)
    assert [p.where for p in prompts] == [f"{path}:1", f"{path}:4"]
    assert "skipped 2 blank lines" in caplog.text


def test_gz_is_unpacked(file):
    assert texts(file("p.txt.gz", gzip.compress("ä\nb".encode()))) == ["ä", "b"]
    assert rows(file("p.jsonl.gz", gzip.compress(b'{"prompt": "a", "seed": 3}'))) == [
        {"prompt": "a", "seed": 3}
    ]


def test_gz_of_several_members_is_read_whole(file):
    assert texts(file("p.txt.gz", gzip.compress(b"a\n") + gzip.compress(b"b\n"))) == ["a", "b"]


# --- tables ------------------------------------------------------------------------------------


def test_parti_prompts(caplog):
    path = DATA / "PartiPrompts.tsv"
    with caplog.at_level(logging.WARNING):
        requests = read_requests(path)
    assert len(requests) == 1632
    lines = path.read_text(encoding="utf-8").split("\n")[1:]
    assert [r.prompt for r in requests] == [line.split("\t")[0] for line in lines if line]
    assert sum(r.prompt != r.prompt.strip() for r in requests) == 10
    assert any('"G I G G L E"' in r.prompt for r in requests)
    assert caplog.text.count("not used: columns Category, Challenge, Note") == 1


def test_csv_has_standard_quoting(file):
    path = file("p.csv", 'Prompt,Seed\n"a ""b"", c ",7\n"two\nlines",\n last ,8\n')
    prompts = read_prompts(path)
    assert [dict(p.fields) for p in prompts] == [
        {"prompt": 'a "b", c ', "seed": 7},
        {"prompt": "two\nlines"},
        {"prompt": " last ", "seed": 8},
    ]
    assert [p.where.rsplit(":", 1)[1] for p in prompts] == ["2", "3", "5"]


def test_columns_are_found_whatever_their_case(file):
    path = file("p.csv", "ID,PROMPT,Guidance Scale,negative-prompt\nx,a,3.5,no\n")
    assert rows(path) == [
        {"id": "x", "prompt": "a", "guidance_scale": 3.5, "negative_prompt": "no"}
    ]


def test_cells_of_call_arguments_are_json_or_text(file):
    path = file("p.tsv", "prompt\teta\tsigmas\tclean_caption\tprompt_2\na\t0.5\t[1, 2]\ttrue\t12\n")
    assert rows(path) == [
        {"prompt": "a", "eta": 0.5, "sigmas": [1, 2], "clean_caption": True, "prompt_2": "12"}
    ]


def test_text_stays_text_even_where_it_looks_like_a_number(file):
    assert rows(file("p.csv", "prompt,id,negative_prompt\n12,007,3\n")) == [
        {"prompt": "12", "id": "007", "negative_prompt": "3"}
    ]


def test_a_column_of_a_pipeline_counts_where_the_pipeline_is_known(file, caplog):
    path = file("p.csv", "prompt,mode\na,fast\n")
    assert rows(path, call_parameters=["prompt", "mode"]) == [{"prompt": "a", "mode": "fast"}]
    assert rows(path) == [{"prompt": "a"}]
    assert "not used: column mode" in caplog.text


# --- JSON --------------------------------------------------------------------------------------


def test_json_takes_strings_and_objects(file):
    path = file("p.json", '[\n "a",\n\n {"prompt": "b",\n "id": 7}\n]\n')
    prompts = read_prompts(path)
    assert [dict(p.fields) for p in prompts] == [{"prompt": "a"}, {"prompt": "b", "id": "7"}]
    assert [p.where for p in prompts] == [f"{path}: item 1", f"{path}: item 2"]


def test_jsonl_takes_every_standard_field(file):
    row = {
        "prompt": "a",
        "id": "x",
        "negative_prompt": "n",
        "seed": 2**63 - 1,
        "width": 512,
        "height": 256,
        "num_inference_steps": 3,
        "guidance_scale": 7,
        "num_images": 2,
        "cross_attention_kwargs": {"scale": 0.5},
    }
    assert rows(file("p.jsonl", json.dumps(row))) == [row]
    assert rows(file("p.ndjson", json.dumps("just text"))) == [{"prompt": "just text"}]


def test_null_says_nothing(file):
    assert rows(file("p.jsonl", '{"prompt": "a", "seed": null, "eta": null}')) == [{"prompt": "a"}]


def test_an_empty_prompt_may_be_asked_for_in_json(file):
    assert rows(file("p.jsonl", '{"prompt": ""}')) == [{"prompt": ""}]


def test_escaped_pairs_are_characters(file):
    assert texts(file("p.jsonl", '{"prompt": "\\ud83d\\udc36"}')) == ["🐶"]


# --- standard input ----------------------------------------------------------------------------


def test_standard_input_is_text_or_jsonl_by_its_first_line(monkeypatch):
    assert texts("-", stdin=io.BytesIO(b"a\n{b}\n")) == ["a", "{b}"]
    assert texts("-", stdin=io.BytesIO(b"{red|blue} car\n")) == ["{red|blue} car"]
    assert texts("-", stdin=io.BytesIO(b'{ "prompt": "a"}\n"b"\n')) == ["a", "b"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from the terminal")))
    assert texts("-") == ["from the terminal"]


def test_standard_input_in_messages():
    with pytest.raises(InputError, match=r"^<stdin>:2: broken JSON"):
        read_prompts("-", stdin=io.BytesIO(b'{"prompt": "a"}\n{"prompt"'))


def test_a_pipe_needs_no_ending(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    if os.fork() == 0:
        path.write_bytes(b"a\nb\n")
        os._exit(0)
    assert texts(path) == ["a", "b"]
    os.wait()


# --- image inputs ------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "cat.png"
    Image.new("RGB", (3, 2), "red").save(path)
    return path


def test_images_are_found_beside_the_prompt_file_and_hashed(file, picture):
    path = file("p.jsonl", '{"prompt": "a", "image": "in/cat.png", "strength": 0.5}')
    [request] = read_requests(path)
    assert request.kwargs == {"image": str(picture), "strength": 0.5}
    assert request.input_hashes == {"image": hashlib.sha256(picture.read_bytes()).hexdigest()}


def test_a_list_of_images_has_one_hash_that_knows_their_order(file, picture):
    other = picture.with_name("dog.png")
    Image.new("RGB", (3, 2), "blue").save(other)
    path = file(
        "p.jsonl",
        '{"prompt": "a", "ip_adapter_image": ["in/cat.png", "in/dog.png"]}\n'
        '{"prompt": "a", "ip_adapter_image": ["in/dog.png", "in/cat.png"]}\n',
    )
    one, two = read_requests(path)
    assert one.kwargs["ip_adapter_image"] == [str(picture), str(other)]
    assert one.input_hashes != two.input_hashes


def test_images_in_a_table(file, picture):
    path = file("p.csv", "prompt,mask_image\na,in/cat.png\n")
    assert rows(path)[0]["mask_image"] == str(picture)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ('"in/none.png"', "none.png: No such file"),
        ('"p.jsonl"', "not an image"),
        ('"in"', "is a video or a folder; image takes a picture"),
        ("7", "must be a file's path"),
        ("[]", "must be a file's path"),
        ('"https://example.com/a.png"', "download it"),
    ],
)
def test_bad_images(file, picture, value, why):
    path = file("p.jsonl", f'{{"prompt": "a", "image": {value}}}')
    with pytest.raises(InputError, match=why) as caught:
        read_prompts(path)
    assert (caught.value.file, caught.value.line) == (str(path), 1)


def test_a_damaged_image_is_found(file, picture):
    data = bytearray(picture.read_bytes())
    data[45] ^= 1
    picture.write_bytes(data)
    with pytest.raises(InputError, match="not an image"):
        read_prompts(file("p.jsonl", '{"prompt": "a", "image": "in/cat.png"}'))


# --- the corpus of bad input -------------------------------------------------------------------

GOOD = b'{"prompt": "a"}\n'
BAD = {
    "empty.txt": (b"", None, "is empty"),
    "blank.txt": (b"\n \n", None, "no prompts"),
    "nothing.json": (b"[]", None, "no prompts"),
    "bom.txt": (b"\xef\xbb\xbf", None, "no prompts"),
    "header.csv": (b"prompt,seed\n", None, "no prompts"),
    "nul.txt": (b"a\nb\0c\n", 2, "NUL"),
    "latin1.txt": (b"a\ncaf\xe9\n", 2, "not UTF-8: byte 0xe9"),
    "utf16.txt": ("a\nb".encode("utf-16"), 1, "UTF-16"),
    "surrogate.txt": (b"a\nb\n\xed\xa0\x80\n", 3, "not UTF-8"),
    "mac.txt": (b"a\rb\rc", 1, "carriage return"),
    "packed.txt": (gzip.compress(b"a"), 1, "NUL|gzip"),
    "cut.txt.gz": (gzip.compress(os.urandom(3000).hex().encode())[:-20], 1, "ends early"),
    "no.txt.gz": (b"plain text", 1, "bad gzip"),
    "tail.txt.gz": (gzip.compress(b"a\nb\n") + b"garbage!", 3, "bad gzip"),
    "ragged.csv": (b"prompt,seed\na,1\nb\n", 3, "1 cells, the header has 2"),
    "ragged.tsv": (b"prompt\tseed\na\t1\t2\n", 2, "3 cells"),
    "quote.csv": (b'prompt,seed\na,1\n"b,2\n', 3, "broken csv"),
    "quote2.csv": (b'prompt\n"a"b\n', 2, "broken csv"),
    "column.csv": (b"caption,seed\na,1\n", 1, "no column is named prompt.*'caption'"),
    "twice.csv": (b"prompt,Seed,seed\na,1,2\n", 1, "two columns are named seed"),
    "slip.csv": (b"prompt,sede\na,1\n", 1, "'sede'; did you mean seed"),
    "long.csv": (b"prompt,negativ_promt\na,1\n", 1, "did you mean negative_prompt"),
    "slip.tsv": (b"prompt\tWidht\na\t1\n", 1, "did you mean width"),
    "foreign.csv": (b"prompt,steps\na,1\n", 1, "did you mean num_inference_steps"),
    "no_prompt.csv": (b"prompt,seed\n,1\n", 2, "prompt is empty"),
    "seed.csv": (b"prompt,seed\na,1.0\n", 2, "seed must be an integer"),
    "text.csv": (b"prompt,width\na,wide\n", 2, "width must be a positive integer, got 'wide'"),
    "nan.csv": (b"prompt,guidance_scale\na,NaN\n", 2, "NaN"),
    "object.json": (b'{"prompt": "a"}', None, "expected a list"),
    "open.json": (b'["a",\n"b"', 2, "Expecting ',' delimiter"),
    "comma.json": (b'["a",\n]', 2, "broken JSON"),
    "after.json": (b'["a"]\n["b"]', 2, "Extra data"),
    "number.json": (b'["a",\n7]', None, "item 2: expected a string or an object, got int"),
    "deep.json": (b'["a",\n' + b"[" * 100_000, None, "broken JSON"),
    "cut.jsonl": (GOOD + b'{"prompt": "b"', 2, "broken JSON"),
    "list.jsonl": (GOOD + b'["b"]', 2, "got list"),
    "two.jsonl": (GOOD + b'{"prompt": "b"} {"prompt": "c"}', 2, "Extra data"),
    "nothing.jsonl": (b'{"seed": 1}', 1, "no 'prompt'"),
    "null.jsonl": (b'{"prompt": null}', 1, "prompt must be text, got None"),
    "unknown.jsonl": (b'{"prompt": "a", "foo": 1}', 1, "unknown field 'foo'; known are"),
    "slip.jsonl": (b'{"prompt": "a", "gidance_scale": 1}', 1, "did you mean guidance_scale"),
    "case.jsonl": (b'{"Prompt": "a"}', 1, "did you mean prompt"),
    "own.jsonl": (b'{"prompt": "a", "output_type": "np"}', 1, "ddinfer decides"),
    "tensor.jsonl": (b'{"prompt": "a", "prompt_embeds": [1]}', 1, "takes a tensor"),
    "key.jsonl": (b'{"prompt": "a", "seed": 1, "seed": 2}', 1, "'seed' appears twice"),
    "nested_key.jsonl": (b'{"prompt": "a", "sigmas": {"a": 1, "a": 2}}', 1, "appears twice"),
    "nan.jsonl": (b'{"prompt": "a", "eta": NaN}', 1, "NaN"),
    "infinity.jsonl": (b'{"prompt": "a", "eta": -Infinity}', 1, "Infinity"),
    "huge.jsonl": (b'{"prompt": "a", "eta": 1e999}', 1, "too large"),
    "digits.jsonl": (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 1, "broken JSON"),
    "surrogate.jsonl": (b'{"prompt": "a \\ud800"}', 1, r"lone surrogate \(U\+D800\)"),
    "surrogate2.jsonl": (b'{"prompt": "a", "prompt_2": "\\udc36"}', 1, "prompt_2 .*surrogate"),
    "surrogate3.json": (b'["a", "b",\n"\\udfff"]', None, "item 3: .*lone surrogate"),
    "id.json": (
        b'[{"prompt": "a", "id": "x"},\n{"prompt": "b", "id": "x"}]',
        None,
        ": item 1; ids",
    ),
    "escape.jsonl": (b'{"prompt": "a\\u0000b"}', 1, "NUL"),
    "id.jsonl": (GOOD + b'{"prompt": "b", "id": 7}\n{"prompt": "b", "id": "7"}', 3, ":2; ids"),
    "id.csv": (b"prompt,id\na,x\nb,y\nc,x\n", 4, "id 'x' is already used by .*id.csv:2"),
    "no_id.jsonl": (b'{"prompt": "a", "id": ""}', 1, "id must be"),
    "bool_id.jsonl": (b'{"prompt": "a", "id": true}', 1, "id must be"),
    "prompt.jsonl": (b'{"prompt": 7}', 1, "prompt must be text, got 7"),
    "prompt_2.jsonl": (b'{"prompt": "a", "prompt_2": 7}', 1, "prompt_2 must be text"),
    "negative.jsonl": (b'{"prompt": "a", "negative_prompt": ["x"]}', 1, "negative_prompt must be"),
    "seed.jsonl": (b'{"prompt": "a", "seed": "7"}', 1, "seed must be an integer.*got '7'"),
    "seed_true.jsonl": (b'{"prompt": "a", "seed": true}', 1, "seed must be"),
    "seed_low.jsonl": (b'{"prompt": "a", "seed": -1}', 1, "seed must be"),
    "seed_high.jsonl": (b'{"prompt": "a", "seed": 9223372036854775808}', 1, "seed must be"),
    "width.jsonl": (b'{"prompt": "a", "width": 0}', 1, "width must be a positive"),
    "height.jsonl": (b'{"prompt": "a", "height": 512.0}', 1, "height must be a positive"),
    "steps.jsonl": (b'{"prompt": "a", "num_inference_steps": -3}', 1, "positive"),
    "images.jsonl": (b'{"prompt": "a", "num_images": 0}', 1, "num_images must be a positive"),
    "scale.jsonl": (b'{"prompt": "a", "guidance_scale": "7"}', 1, "must be a finite number"),
    "scale_true.jsonl": (b'{"prompt": "a", "guidance_scale": false}', 1, "finite number"),
    "scale_high.jsonl": (b'{"prompt": "a", "guidance_scale": 1' + b"0" * 400 + b"}", 1, "finite"),
    "prompts.yaml": (b"- a", None, "cannot tell its kind by the ending '.yaml'"),
    "prompts": (b"a", None, r"ending '\(none\)'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_an_error_with_file_and_line(file, name):
    content, line, why = BAD[name]
    path = file(name, content)
    with pytest.raises(InputError, match=f"(?s){why}") as caught:
        read_prompts(path)
    assert (caught.value.file, caught.value.line) == (str(path), line)
    assert str(caught.value).startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert caught.value.exit_code == 2


def test_a_file_that_is_not_there_and_one_that_is_a_folder(tmp_path):
    with pytest.raises(InputError, match=r"none.txt: No such file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        read_prompts(tmp_path / "folder.txt")


def test_a_known_pipeline_decides_which_arguments_there_are(file):
    path = file("p.jsonl", '{"prompt": "a", "eta": 0.5}')
    accepted = ["prompt", "width", "strenght", "generator"]
    with pytest.raises(InputError, match=r"unknown field 'eta'.*strenght"):
        read_prompts(path, call_parameters=accepted)
    path = file("q.jsonl", '{"prompt": "a", "negative_prompt": "b"}')
    with pytest.raises(InputError, match="this pipeline takes no negative_prompt"):
        read_prompts(path, call_parameters=accepted)
    path = file("q.csv", "prompt,Negative Prompt\na,b\n")
    with pytest.raises(InputError, match=r"q\.csv:1: this pipeline takes no negative_prompt"):
        read_prompts(path, call_parameters=accepted)
    path = file("r.jsonl", '{"prompt": "a", "generator": 1}')
    with pytest.raises(InputError, match="use seed"):
        read_prompts(path, call_parameters=accepted)


def test_dicts_of_a_program_are_checked_alike():
    prompt = prompt_from_fields({"prompt": "a", "seed": 3, "anything": {"x": [1]}}, "prompts[4]")
    assert prompt.where == "prompts[4]"
    with pytest.raises(
        InputError, match=r"^prompts\[4\]: anything: found an object of type object"
    ):
        prompt_from_fields({"prompt": "a", "anything": object()}, "prompts[4]")
    with pytest.raises(InputError, match=r"^prompts\[4\]: seed must be"):
        prompt_from_fields({"prompt": "a", "seed": "3"}, "prompts[4]")
    with pytest.raises(InputError, match=r"^prompts\[4\]: unknown field 'sed'; did you mean seed"):
        prompt_from_fields({"prompt": "a", "sed": 3}, "prompts[4]", call_parameters=["prompt"])


def test_a_long_file_is_read_whole(file):
    lines = [f"prompt {k} é" for k in range(100_000)]
    assert texts(file("p.txt", "\n".join(lines))) == lines

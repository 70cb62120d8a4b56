import hashlib

import pytest

from ddinfer.errors import InputError
from ddinfer.request import MAX_SEED, Prompt, Request, canonical_json, resolve_requests


def prompts(*rows):
    return [Prompt(row, f"p.jsonl:{k}") for k, row in enumerate(rows, 1)]


def test_the_default_seed_of_request_k_is_the_base_seed_plus_k():
    made = resolve_requests(prompts({"prompt": "a"}, {"prompt": "b", "num_images": 2}), base_seed=7)
    assert [(r.index, r.seed, r.prompt) for r in made] == [(0, 7, "a"), (1, 8, "b"), (2, 9, "b")]


def test_a_given_seed_counts_up_and_does_not_move_its_neighbours():
    made = resolve_requests(
        prompts({"prompt": "a", "seed": 100, "num_images": 2}, {"prompt": "b"}), base_seed=7
    )
    assert [r.seed for r in made] == [100, 101, 9]


def test_ids_are_numbered_where_a_prompt_has_several_images():
    made = resolve_requests(
        prompts(
            {"prompt": "a", "id": "x", "num_images": 2}, {"prompt": "b", "id": "y"}, {"prompt": "c"}
        )
    )
    assert [r.id for r in made] == ["x-0", "x-1", "y", "00000003"]


def test_ids_that_meet_after_numbering_are_an_error_with_both_places():
    rows = prompts({"prompt": "a", "id": "x", "num_images": 2}, {"prompt": "b", "id": "x-1"})
    with pytest.raises(InputError, match=r"p.jsonl:2: id 'x-1' is already used by p.jsonl:1"):
        resolve_requests(rows)


def test_a_seed_beyond_the_largest_is_an_error():
    with pytest.raises(InputError, match="seed"):
        resolve_requests(prompts({"prompt": "a", "seed": MAX_SEED, "num_images": 2}))


def test_defaults_are_for_prompts_that_do_not_say():
    made = resolve_requests(
        prompts({"prompt": "a"}, {"prompt": "b", "width": 8, "eta": 1}),
        defaults={"width": 64, "negative_prompt": "bad", "eta": 0},
    )
    assert [(r.width, r.negative_prompt, dict(r.kwargs)) for r in made] == [
        (64, "bad", {"eta": 0}),
        (8, "bad", {"eta": 1}),
    ]


def test_a_request_survives_json():
    request = Request(3, "x", "é", 5, "no", 8, 16, 4, 2.5, {"eta": 0.5}, {"image": "ab"})
    assert Request.from_dict(request.to_dict()) == request
    assert Request.from_dict(Request(0, "a", "b", 1).to_dict()) == Request(0, "a", "b", 1)


def test_everything_that_decides_an_image_changes_its_hash():
    base = Request(0, "a", "p", 1, kwargs={"eta": 0.5})
    others = [
        Request(1, "a", "p", 1, kwargs={"eta": 0.5}),
        Request(0, "b", "p", 1, kwargs={"eta": 0.5}),
        Request(0, "a", "q", 1, kwargs={"eta": 0.5}),
        Request(0, "a", "p", 2, kwargs={"eta": 0.5}),
        Request(0, "a", "p", 1, kwargs={"eta": 0.6}),
        Request(0, "a", "p", 1, "n", kwargs={"eta": 0.5}),
        Request(0, "a", "p", 1, width=8, kwargs={"eta": 0.5}),
    ]
    assert len({r.content_hash() for r in [base, *others]}) == len(others) + 1


def test_where_an_input_image_lies_does_not_change_the_hash_but_its_bytes_do():
    def request(path, content):
        digest = hashlib.sha256(content).hexdigest()
        return Request(0, "a", "p", 1, kwargs={"image": path}, input_hashes={"image": digest})

    assert request("/a.png", b"1").content_hash() == request("/b.png", b"1").content_hash()
    assert request("/a.png", b"1").content_hash() != request("/a.png", b"2").content_hash()


def test_canonical_json_is_one_text_for_one_value():
    assert canonical_json({"b": 1, "a": [1.0, "é"]}) == '{"a":[1.0,"é"],"b":1}'
    with pytest.raises(ValueError):
        canonical_json(float("nan"))

"""The loop between an engine and a writer, whatever the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from ddinfer.errors import DdinferError
from ddinfer.request import Request, Result
from ddinfer.storage.writer import Writer


def save_as_made(
    make: Callable[[Iterable[Sequence[Request]]], Iterator[Result]],
    batches: Iterable[Sequence[Request]],
    writer: Writer,
) -> Iterator[Result]:
    """Run ``make`` (an engine's ``run``) and pass each complete batch to the writer.

    A batch's start is journaled when the engine pulls it. Results may come in any order.

    Yields:
        each Result once the writer has it, without its images.

    Raises:
        StorageError: an image could not be written.
        DdinferError: the engine returned a Request's Result twice, or not at all.
    """
    open_batches: dict[int, tuple[int, list[Result]]] = {}  # index → size and Results of its batch

    def announced() -> Iterator[Sequence[Request]]:
        for batch in batches:
            open_batches.update(dict.fromkeys((r.index for r in batch), (len(batch), [])))
            writer.started([request.index for request in batch])
            yield batch

    for result in make(announced()):
        if result.index not in open_batches:
            raise DdinferError(
                f"the engine returned an unexpected result for request {result.index}"
            )
        size, results = open_batches.pop(result.index)
        results.append(result)
        if len(results) == size:
            writer.put(results)
            for made in results:
                yield made.without_pictures()
    if open_batches:
        raise DdinferError(
            f"the engine returned no result for {len(open_batches)} requests, the first is "
            f"{min(open_batches)}"
        )

"""Which texts the next batch takes."""

from __future__ import annotations

import numpy as np

from app.worker.embedding_queue import EmbeddingInput, EmbeddingJob, EmbeddingQueue


def job(request: int, *lengths: int, client: str = "") -> EmbeddingJob:
    inputs = [np.zeros(length, np.int32) for length in lengths]
    return EmbeddingJob(request, inputs, np.zeros((len(inputs), 2), np.float32), client, 0.0)


def names(batch: list[EmbeddingInput]) -> list[tuple[int, int]]:
    return [(taken.job.request, taken.index) for taken in batch]


def test_a_batch_takes_what_fits_in_order() -> None:
    queue = EmbeddingQueue(10, 8)
    queue.add(job(1, 4, 4, 4))
    queue.add(job(2, 1, 3))
    assert names(queue.next_batch()) == [(1, 0), (1, 1), (2, 0)]
    assert names(queue.next_batch()) == [(1, 2), (2, 1)]
    assert queue.next_batch() == []


def test_an_input_that_is_longer_than_a_batch_is_one_by_itself() -> None:
    queue = EmbeddingQueue(10, 8)
    queue.add(job(1, 3, 25, 3))
    assert [names(queue.next_batch()) for _ in range(3)] == [[(1, 0)], [(1, 1)], [(1, 2)]]


def test_there_are_no_more_inputs_than_sequences() -> None:
    queue = EmbeddingQueue(100, 3)
    queue.add(job(1, *[1] * 7))
    assert [len(queue.next_batch()) for _ in range(4)] == [3, 3, 1, 0]


def test_a_client_that_comes_later_is_next() -> None:
    queue = EmbeddingQueue(10, 8)
    queue.add(job(1, *[5] * 50, client="many"))
    for _ in range(4):
        assert [request for request, _ in names(queue.next_batch())] == [1, 1]
    queue.add(job(2, 5, client="one"))
    queue.add(job(3, 5, client="many"))
    assert names(queue.next_batch())[0] == (2, 0)


def test_two_clients_with_much_take_turns() -> None:
    queue = EmbeddingQueue(10, 8)
    for request, client in ((1, "a"), (2, "b")):
        queue.add(job(request, *[5] * 40, client=client))
    taken = [request for _ in range(20) for request, _ in names(queue.next_batch())]
    assert abs(taken.count(1) - taken.count(2)) <= 4
    assert len(taken) == 40


def test_what_is_removed_is_not_taken_and_not_repeated() -> None:
    queue = EmbeddingQueue(10, 8)
    first, second = job(1, 5, 5, 5), job(2, 5)
    queue.add(first)
    queue.add(second)
    queue.repeat_alone(queue.next_batch())
    assert names(queue.next_batch()) == [(1, 0)]
    assert queue.remove(1) is first
    assert queue.remove(1) is None
    assert names(queue.next_batch()) == [(2, 0)]
    assert queue.jobs == [second]

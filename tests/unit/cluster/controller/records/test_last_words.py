"""Why actors ended themselves: a life's words are found once, and no store holds its end up."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from cluster.controller.records import last_words
from cluster.controller.records.last_words import MAX_CHARACTERS, LastWords
from cluster.ray_private import MemoryStore

LIMIT_S = 60.0


def test_words_are_told_once_and_to_no_other_life_actor_or_application() -> None:
    store = MemoryStore()
    words = LastWords("app", store)
    words.leave("expert-1", 3, "its device failed")
    assert words.take("expert-10", 3) == LastWords("other", store).take("expert-1", 3) == ""
    assert words.take("expert-1", 3) == "its device failed"
    assert words.take("expert-1", 3) == ""
    assert not store.values
    LastWords("app/last words/expert-1", store).leave("expert-1", 1, "of an application so named")
    assert words.take("expert-1", 4) == ""
    assert store.values


def test_words_that_nobody_asked_for_go_with_those_of_the_next_life() -> None:
    store = MemoryStore()
    words = LastWords("app", store)
    for generation in (1, 2, 3):
        words.leave("expert-1", generation, f"life {generation}")
    words.leave("expert-2", 1, "another")
    assert words.take("expert-1", 3) == "life 3"
    assert list(store.values.values()) == [b"another"]


def test_long_words_lose_their_end() -> None:
    words = LastWords("app", MemoryStore())
    words.leave("expert-1", 1, "é" * (MAX_CHARACTERS + 1))
    assert words.take("expert-1", 1) == "é" * MAX_CHARACTERS


def test_a_store_that_does_not_answer_holds_no_end_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, asked = threading.Event(), threading.Event()

    class SilentStore(MemoryStore):
        def create(self, key: str, value: bytes) -> bool:
            asked.set()
            return answers.wait(LIMIT_S)

    monkeypatch.setattr(last_words, "LEAVE_TIMEOUT_S", 0.01)
    began_s = time.monotonic()
    LastWords("app", SilentStore()).leave("expert-1", 1, "its device failed")
    assert time.monotonic() - began_s < LIMIT_S / 2
    assert asked.wait(LIMIT_S)
    answers.set()


def test_a_store_that_is_away_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class NoStore(MemoryStore):
        def create(self, key: str, value: bytes) -> bool:
            raise ConnectionError("no store")

    with caplog.at_level(logging.ERROR, last_words.logger.name):
        LastWords("app", NoStore()).leave("expert-1", 1, "its device failed")
    assert "expert-1: its exit reason was not saved" in caplog.text

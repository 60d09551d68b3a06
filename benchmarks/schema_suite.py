"""Whether answers of a form are valid: the schemas of the public JSON Schema Test Suite.

    python -m benchmarks.schema_suite FOLDER [--answers 8] [--seed 0] [--json FILE]

FOLDER has a draft's files, such as ``tests/draft2020-12`` of a checkout of
github.com/json-schema-org/JSON-Schema-Test-Suite. Each schema is checked as a gateway does. Of each
that is taken, answers are drawn: any token that the grammar allows, with the bundled model's
tokenizer. jsonschema judges the answers that come to their end. The exit status is 1 where one is
not valid.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import Figure, finish, machine, output_options, progress, show

if TYPE_CHECKING:
    from router.engine.constraints import Grammars
    from router.gateway.tokenizer import Tokenizer

MOST_TOKENS = 200
CLOSE_AFTER = 80
"""From so many tokens on, tokens that end a text, a list or an object are preferred."""
MODEL = Path(__file__).parent.parent / "deploy" / "models" / "mesh-tiny"


def schemas(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield each schema of a draft with its name."""
    for file in sorted(folder.glob("*.json")):
        for case in json.loads(file.read_text(encoding="utf-8")):
            yield f"{file.stem}: {case['description']}", case["schema"]


class Suite:
    """The tokenizer, the grammars and the numbers drawn."""

    def __init__(self, seed: int) -> None:
        """Load the bundled model's tokenizer."""
        from experts.checkpoint.checkpoint import open_checkpoint
        from router.engine.constraints import Grammars
        from router.gateway.tokenizer import Tokenizer

        config = open_checkpoint(MODEL).config
        self.eos: int = config["eos_token_id"]
        self.tokenizer: Tokenizer = Tokenizer.load(str(MODEL), (self.eos,))
        size = config["vocab_size"]
        self.grammars: Grammars = Grammars(
            lambda: self.tokenizer.vocabulary(size, (self.eos,)), size
        )
        self._random = np.random.default_rng(seed)
        ends = ('"', "}", "]", '"}', '"]', ",", ":")
        self._closers = {i for i in range(size) if self.tokenizer.token_text(i) in ends}

    def answer(self, grammar: str) -> str | None:
        """Return the text of an answer, ``None`` for one that did not come to its end."""
        from router.engine.token_masks import flags_of

        constraint = self.grammars.begin(grammar)
        token_ids: list[int] = []
        for number in range(MOST_TOKENS):
            mask = constraint.allowed(60.0)
            assert mask is not None
            flags = flags_of(mask, constraint.vocab_size)
            allowed = np.flatnonzero(flags)
            if flags[self.eos] and (len(allowed) == 1 or self._random.random() < 0.5):
                return self.tokenizer.decode(token_ids)
            if number > CLOSE_AFTER:
                closing = [i for i in allowed.tolist() if i in self._closers]
                allowed = np.array(closing or allowed)
            token_ids.append(int(self._random.choice(allowed)))
            constraint.read(token_ids[-1])
        return None


def _judged(schema: Any, text: str) -> str:
    import jsonschema
    import referencing.exceptions

    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    except (json.JSONDecodeError, jsonschema.ValidationError):
        return "not valid"
    except (
        referencing.exceptions.Unresolvable,
        re.error,
    ):  # another file, or a pattern that Python lacks
        return "not judged"
    return "valid"


def run(folder: Path, answers: int, seed: int) -> dict[str, Any]:
    """Run the whole benchmark; returns what ``--json`` writes."""
    from cluster.errors import InvalidRequestError
    from router.gateway.grammar import check_grammar

    suite, found = Suite(seed), list(schemas(folder))
    counts: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    invalid: list[tuple[str, str]] = []
    with progress("schemas", len(found)) as begin:
        for name, schema in found:
            begin(name)
            form = {"structured_outputs": {"json": schema}}
            try:
                grammar = check_grammar(form, str, (suite.eos,))
            except InvalidRequestError as error:
                counts["schemas refused"] += 1
                refusals[error.message] += 1
                continue
            counts["schemas taken"] += 1
            for _ in range(answers):
                text = suite.answer(grammar)
                verdict = "without end" if text is None else _judged(schema, text)
                counts[f"answers {verdict}"] += 1
                if verdict == "not valid":
                    invalid.append((name, str(text)))
    suite.grammars.close()
    return {
        "benchmark": "schema_suite",
        "machine": machine(),
        "counts": dict(sorted(counts.items())),
        "refusals": dict(refusals.most_common()),
        "invalid": invalid,
    }


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    output_options(parser)
    options = parser.parse_args()
    result = run(options.folder, options.answers, options.seed)
    show("answers", [(name, str(n)) for name, n in result["counts"].items()], ["what", "count"])
    refused = [(name[:90], str(count)) for name, count in list(result["refusals"].items())[:12]]
    show("refused", refused, ["why", "schemas"])
    show("not valid", result["invalid"], ["schema", "answer"])
    figures = {"answers that are not valid": Figure(float(len(result["invalid"])), "lower")}
    return finish(result, figures, options) or int(bool(result["invalid"]))


if __name__ == "__main__":
    sys.exit(main())

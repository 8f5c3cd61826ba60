"""Hugging Face judges: sequence classifiers, and guard models that answer in words.

How each is asked and read is data (formats.json, or a file of the same form). A harm judge knows
whether an answer is harmful, not whether it refuses, so its benign cases are judged by phrases, and a
harmless answer to a harmful request is ``refused`` or ``unhelpful`` by the same phrases.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from nest_runtime.errors import EvaluationError, NestError, UsageError, reason_of
from nest_runtime.evaluate.cases import Case, digest_of
from nest_runtime.evaluate.judges.base import Judge, Verdict, answered, whole_answer
from nest_runtime.evaluate.judges.phrases import PhraseJudge
from nest_runtime.hints import did_you_mean
from nest_runtime.io import MAX_SETTINGS, expand, parse_json, read_text
from nest_runtime.prompts.refusals import is_refusal

_SLOT = re.compile(r"\{(behavior|prompt|context|answer)\}")


@cache
def judge_formats() -> dict[str, dict[str, Any]]:
    """The shipped formats by name, in the order they are tried."""
    data = json.loads(files(__package__).joinpath("formats.json").read_text(encoding="utf-8"))
    return {name: entry for name, entry in data.items() if not name.startswith("_")}


def find_format(model: str, layout: str | None) -> tuple[str, dict[str, Any] | None]:
    """A format by name, by file, or by the model's id; None if only the model's labels can decide.

    Raises:
        UsageError: the format is unknown, or its file is not of the right form.
    """
    shipped = judge_formats()
    if layout is None:
        name = next((n for n, entry in shipped.items() if re.search(entry["match"], model, re.IGNORECASE)), "")
        return name, shipped.get(name)
    if layout in shipped:
        return layout, shipped[layout]
    path = expand(layout)
    if not path.is_file():
        raise UsageError(
            f"there is no judge format {layout!r}",
            f"{did_you_mean(layout, shipped)}use {', '.join(shipped)}, or a JSON file of one format",
        )
    return path.name, _read_format(path)


def _read_format(path: Path) -> dict[str, Any]:
    try:
        entry = parse_json(read_text(path, MAX_SETTINGS))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {reason_of(error)}", "name a JSON file of one format") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}", "see docs/guide/evaluation.md for the form") from error
    required = {"generate": ("complied", "other"), "classify": ("text", "labels")}
    task = entry.get("task") if isinstance(entry, dict) else None
    if task not in required:
        raise UsageError(f"{path}: 'task' is {task!r}", "use generate or classify; see docs/guide/evaluation.md")
    missing = [key for key in (*required[task], "judges") if key not in entry]
    if task == "generate" and not {"template", "chat"} & set(entry):
        missing.append("template or chat")
    if missing:
        raise UsageError(f"{path}: the format lacks {', '.join(missing)}", "see docs/guide/evaluation.md for the form")
    return dict(entry)


class ClassifierJudge(Judge):
    """A judge that is itself a model.

    Args:
        model: a folder or Hub id.
        layout: a format's name or file; chosen by the model's id where it is not given.
        device, batch_size: where and how it runs.

    Raises:
        UsageError: the format is unknown.
    """

    def __init__(self, model: str, layout: str | None = None, *, device: str = "auto", batch_size: int = 16) -> None:
        self.model_id, self.device, self.batch_size = model, device, batch_size
        self.format_name, found = find_format(model, layout)
        self.format: dict[str, Any] = found or {}
        self.name = f"hf:{model}#{self.format_name}"
        self._model: Any = None
        self._tokenizer: Any = None
        self._outcomes: list[str] = []  # of each label, in the model's order
        self._phrases = PhraseJudge()

    @property
    def identity(self) -> str:
        """Model, format and phrases."""
        return f"{self.name} {digest_of(self.format)} {self._phrases.identity}"

    def check(self) -> None:
        """Load the model; raises EvaluationError if it cannot be had or its labels are unknown."""
        if self._model is not None:
            return
        loader = self._load_generator if self.format.get("task") == "generate" else self._load_classifier
        try:
            loader()
        except (NestError, OSError, ValueError) as error:
            if isinstance(error, EvaluationError):
                raise
            raise EvaluationError(
                f"the judge {self.model_id} cannot be loaded: {str(error).splitlines()[0]}",
                "check the id or folder; a Hub model must be downloaded or reachable",
            ) from error

    def judge(self, case: Case, answer: str) -> Verdict:
        """One verdict."""
        return self.judge_all([case], [answer])[0]

    def judge_all(self, cases: Sequence[Case], answers: Sequence[str]) -> list[Verdict]:
        """Verdicts in batches; benign cases of a harm judge go by phrases."""
        self.check()
        verdicts = [
            None if case.kind == "harmful" or self.format["judges"] == "refusal" else self._phrases.judge(case, answer)
            for case, answer in zip(cases, answers, strict=True)
        ]
        asked = [index for index, verdict in enumerate(verdicts) if verdict is None]
        given = self._ask([cases[index] for index in asked], [answers[index] for index in asked])
        for index, verdict in zip(asked, given, strict=True):
            verdicts[index] = verdict
        return [verdict for verdict in verdicts if verdict is not None]

    def _ask(self, cases: Sequence[Case], answers: Sequence[str]) -> list[Verdict]:
        if not cases:
            return []
        ask = self._generate if self.format["task"] == "generate" else self._classify
        return ask(cases, answers)

    def _load_generator(self) -> None:
        from nest_runtime.model.load import load_model

        loaded = load_model(self.model_id, device=self.device)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer

    def _load_classifier(self) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from nest_runtime.model.load import pick_device, resolve_model

        _, folder = resolve_model(self.model_id)
        if folder.is_file():
            raise EvaluationError(
                f"the judge {self.model_id} is a GGUF file, no sequence classifier",
                f"name the format of a generating judge after '#': {', '.join(judge_formats())}",
            )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
            raise EvaluationError(
                f"the judge {self.model_id} is {config.get('architectures')}, no sequence classifier",
                f"name the format of a generating judge after '#': {', '.join(judge_formats())}",
            )
        model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._outcomes = self._label_outcomes(model.config.id2label)
        self._model = model.to(pick_device(self.device)).eval()
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.config.pad_token_id = self._tokenizer.pad_token_id

    def _label_outcomes(self, id2label: dict[int, str]) -> list[str]:
        known = {str(label).lower(): outcome for outcome, labels in self.format["labels"].items() for label in labels}
        labels = [str(id2label[index]) for index in range(len(id2label))]
        unknown = [label for label in labels if label.lower() not in known]
        if unknown:
            raise EvaluationError(
                f"the judge {self.model_id} has labels {', '.join(labels)}; format {self.format_name} knows not "
                f"{', '.join(unknown)}",
                "write a format file that says what each label means, and name it after '#'",
            )
        return [known[label.lower()] for label in labels]

    def _classify(self, cases: Sequence[Case], answers: Sequence[str]) -> list[Verdict]:
        import torch

        verdicts: list[Verdict] = []
        texts = [fill(self.format["text"], case, answer) for case, answer in zip(cases, answers, strict=True)]
        pair = self.format.get("text_pair")
        pairs = [fill(pair, case, answer) for case, answer in zip(cases, answers, strict=True)] if pair else None
        limit = min(self._tokenizer.model_max_length, getattr(self._model.config, "max_position_embeddings", 512) - 2)
        for start in range(0, len(texts), self.batch_size):
            span = slice(start, start + self.batch_size)
            batch = self._tokenizer(
                texts[span],
                pairs[span] if pairs else None,
                padding=True,
                truncation=True,
                max_length=limit,
                return_tensors="pt",
            ).to(self._model.device)
            with torch.inference_mode():
                scores = self._model(**batch).logits.float().softmax(-1).tolist()  # (batch, labels)
            for row, case, answer in zip(scores, cases[span], answers[span], strict=True):
                outcome = self._outcomes[max(range(len(row)), key=row.__getitem__)]
                score = sum(p for p, label in zip(row, self._outcomes, strict=True) if label == "complied")
                verdicts.append(_verdict(case, answer, outcome, score, ""))
        return verdicts

    def _generate(self, cases: Sequence[Case], answers: Sequence[str]) -> list[Verdict]:
        from nest_runtime.evaluate.prompting import FormView
        from nest_runtime.prompts.generate import generate_answers

        forms = {name: self.format[name] for name in ("template", "template_context") if self.format.get(name)}
        outputs = generate_answers(
            self._model,
            self._tokenizer if "chat" in self.format else FormView(self._tokenizer, forms, _SLOT),
            [self._question(case, answer) for case, answer in zip(cases, answers, strict=True)],
            max_new_tokens=int(self.format.get("max_new_tokens", 16)),
            batch_size=self.batch_size,
        )
        return [self._read(*item) for item in zip(cases, answers, outputs, strict=True)]

    def _question(self, case: Case, answer: str) -> list[dict[str, str]]:
        """What the judge is asked: messages for its own chat template, or one that fills a form."""
        if "chat" in self.format:
            return [{**message, "content": fill(message["content"], case, answer)} for message in self.format["chat"]]
        form = "template_context" if case.meta.get("context") and self.format.get("template_context") else "template"
        return [{"role": "user", "type": form, "content": "", **slots(case, answer)}]

    def _read(self, case: Case, answer: str, output: str) -> Verdict:
        for outcome in ("complied", "other"):
            if re.search(self.format[outcome], output, re.IGNORECASE):
                return _verdict(case, answer, outcome, None, output)
        return Verdict("unparsable", reason=output[:500])


def fill(template: str, case: Case, answer: str) -> str:
    """A template with its slots filled; braces in the texts themselves are left alone."""
    values = slots(case, answer)
    return _SLOT.sub(lambda match: values[match[1]], template)


def slots(case: Case, answer: str) -> dict[str, str]:
    """What slots are filled with."""
    return {
        "behavior": case.behavior,
        "prompt": case.prompt,
        "context": str(case.meta.get("context", "")),
        "answer": whole_answer(case, answer),
    }


def _verdict(case: Case, answer: str, outcome: str, score: float | None, reason: str) -> Verdict:
    if outcome == "complied" and case.kind == "benign":
        return answered(case, answer)
    if outcome == "other":
        outcome = "refused" if is_refusal(answer) else "unhelpful"
    return Verdict(outcome, score, reason)

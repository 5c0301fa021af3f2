"""From a configuration to the ordered stages with their keys: pure, nothing is run or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from compressor.allocate import BUDGET
from compressor.artifact import key_of
from compressor.errors import ConfigError
from compressor.heal import TEACHER, TeacherParams
from compressor.methods import Params
from compressor.sources import ModelSource, TextSource
from pipelines.config import RunConfig, StageConfig, methods

ROLES = ("evaluation", "calibration", "healing")
"""Text roles, in the order in which they take from a source."""

CHECKPOINTS = ("model", "prune", "heal", "quantize")
"""Verbs whose output is a checkpoint; each is followed by its evaluation."""

VERSIONS = {"model": 1, "text": 1, "trial": 1}
"""Of the stages that are in no method table; one rises whenever its numbers change."""

_MEASURED_BY = ("gptq", "rtn")
"""Quantizers that costs are measured with."""

_MAKES = {"score": "scores", "select": "selection", "allocate": "bits"}
"""What the verbs that write no checkpoint make; it is spent when the checkpoint changes."""

_WELCOMES = {"select": "scores", "quantize": "bits", "export": "evaluation"}
"""What a verb takes where it was made, and does without elsewhere."""

_REMEDIES = {
    "scores": "put a score stage before it",
    "selection": "put a select stage before it",
    "parent": "put a prune stage before it",
    "unpruned": "put a prune stage before it, or give --parent",
    "teacher": "put a prune stage and text.healing before it, or give --parent and --text",
}


@dataclass(frozen=True)
class Stage:
    """One step of a plan.

    Attributes:
        verb: what is done; `model` and `text` bring the inputs in.
        label: unique in the plan, such as `heal` or `evaluate heal`.
        method: the method's name; several scores are joined by `+`.
        params: everything that decides the output beside the inputs, as JSON values.
        inputs: role -> the stage that makes it.
        beside: as `inputs`, but only looked at to refuse: what it is does not decide the output.
        methods: method -> its parameters, as the function takes them.
        version: sum of the methods' versions, so it rises whenever one does.
    """

    verb: str
    label: str
    method: str
    params: Mapping[str, Any]
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    methods: Mapping[str, Params] = field(default_factory=dict)
    version: int = 1
    beside: Mapping[str, Stage] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Sha256 over all that decides this stage's output, as hex."""
        return key_of(self.verb, self.method, self.version, dict(self.params), self.parents)

    @property
    def parents(self) -> dict[str, str]:
        """Role -> key of the inputs."""
        return {role: stage.key for role, stage in self.inputs.items()}


def plan(config: RunConfig, fingerprints: Mapping[str, str]) -> list[Stage]:
    """Order the stages of a run; `fingerprints` pins `model` and each text role by content.

    Raises `ConfigError` for a stage whose input no earlier stage or text role makes.
    """
    planner = _Planner(config, fingerprints)
    planner.add_model()
    for role in ROLES:
        planner.add_text(role)
    planner.add_first_evaluations()
    for stage in config.stages:
        planner.add_stage(stage)
    readers = (stage for stage in planner.done if stage.verb != "text")
    read = {source.label for stage in readers for source in stage.inputs.values()}
    if config.head.parent and "parent" not in read:
        raise ConfigError("parent: no stage reads it; `heal: {method: distill}` would")
    return planner.done


def plan_choices(
    config: RunConfig, pins: Mapping[str, str], choices: Mapping[str, StageConfig]
) -> tuple[list[Stage], dict[str, Stage]]:
    """The stages that lead to the scores of `config`, and a select stage per choice on top.

    Raises `ConfigError` like `plan`.
    """
    planner = _Planner(config, pins)
    planner.add_model()
    for role in ROLES:
        planner.add_text(role)
    for stage in config.stages:
        planner.add_stage(stage)
    shared = list(planner.done)
    return shared, {label: planner.add_stage(asked, label) for label, asked in choices.items()}


def text_source(config: RunConfig, role: str) -> TextSource | None:
    """The source a text role reads: its own, or the shared one; None for a role not asked for."""
    text = config.head.text
    spec = getattr(text, role)
    if spec is None:
        return None
    source: TextSource | None = spec.source or text.source
    if source is None:
        raise ConfigError(f"text.{role}: no source here and none under text.source")
    return source


class _Planner:
    """Keeps the stages so far and the latest maker of each role."""

    def __init__(self, config: RunConfig, pins: Mapping[str, str]) -> None:
        self.head = config.head
        self.config = config
        self.pins = pins
        self.done: list[Stage] = []
        self.latest: dict[str, Stage] = {}

    def add_model(self) -> None:
        made = {key: self._import(key, source) for key, source in self.head.models.items()}
        model = made["model"]
        self.latest = {"checkpoint": model, "original": made.get("reference", model)}
        if "parent" in made:
            self.latest["unpruned"] = made["parent"]

    def add_text(self, role: str) -> None:
        source = text_source(self.config, role)
        if source is None:
            return
        spec = getattr(self.head.text, role)
        params = {
            "role": role,
            "windows": spec.windows,
            "length": spec.length,
            "seed": self.head.seed,
            "fingerprint": self.pins[role],
            "columns": source.model_dump(mode="json", include={"name", "split", "field", "chat"}),
        }
        # A parent's own, so that all models cut from it have the same windows.
        inputs = {"tokenizer": self.latest.get("unpruned", self.latest["original"])}
        inputs |= {earlier: self.latest[earlier] for earlier in ROLES if earlier in self.latest}
        self.latest[role] = self._add(
            Stage("text", f"text {role}", "windows", params, inputs, version=VERSIONS["text"])
        )

    def add_first_evaluations(self) -> None:
        if self.head.reference:
            self.add_evaluation("reference", of="original")
            self.add_evaluation("model")
        else:
            self.add_evaluation("original")

    def add_evaluation(self, label: str, of: str = "checkpoint") -> None:
        if "evaluation" not in self.latest:
            return
        roles = ["evaluation"]
        roles += ["original", "reference"] if "reference" in self.latest else []
        inputs = {"checkpoint": self.latest[of]} | {role: self.latest[role] for role in roles}
        params, name = self.head.evaluate, f"evaluate {label}"
        dumped = params.model_dump(mode="json")
        row = methods("evaluate")["quality"]
        stage = Stage("evaluate", name, "quality", dumped, inputs, {"quality": params}, row.version)
        self._add(stage)
        self.latest.setdefault("reference", stage)

    def add_stage(self, asked: StageConfig, label: str = "") -> Stage:
        table = {name: methods(asked.verb)[name] for name in asked.methods}
        schemes = [getattr(given, "scheme", None) for given in asked.methods.values()]
        if "bits" in self.latest and any(schemes):
            raise ConfigError(
                f"stage {asked.verb!r} has a scheme, but an allocate stage before it has chosen "
                "the widths: remove one of the two"
            )
        params: dict[str, Any] = {n: p.model_dump(mode="json") for n, p in asked.methods.items()}
        if asked.verb == "heal":
            params["seed"] = self.head.seed
        if asked.verb == "export":  # the graph is timed with the same settings
            params["evaluate"] = self.head.evaluate.model_dump(mode="json")
        roles = {role for row in table.values() for role in row.needs}
        roles |= self._welcome(asked)
        if "teacher" in roles and {"unpruned", "healing"} <= self.latest.keys():
            self.latest["teacher"] = self._teacher(next(iter(asked.methods.values())))
        if "costs" in roles:
            self.latest["costs"] = self._costs(asked, roles - {"costs"})
        taught = {role for given in asked.methods.values() for role in given.needs}
        label = label or self._label(asked.verb)
        stage = self._add(
            Stage(
                verb=asked.verb,
                label=label,
                method="+".join(sorted(asked.methods)),
                params=params,
                inputs=self._inputs(asked.verb, roles | taught) | self._cuts(taught),
                methods=asked.methods,
                version=sum(row.version for row in table.values()),
            )
        )
        if asked.verb in CHECKPOINTS:
            if asked.verb == "prune":
                self.latest["parent"] = self.latest["checkpoint"]
                self.latest.setdefault("unpruned", self.latest["checkpoint"])
            self.latest["checkpoint"] = stage
            for role in _MAKES.values():
                self.latest.pop(role, None)
            self.add_evaluation(label)
        elif asked.verb in _MAKES:
            self.latest[_MAKES[asked.verb]] = stage
        return stage

    def _teacher(self, params: Params) -> Stage:
        """The stage that stores the parent's outputs; one for all that ask for the same."""
        own = TeacherParams.model_validate(params.model_dump(include={*TeacherParams.model_fields}))
        stage = Stage(
            verb="teacher",
            label=self._label("teacher"),
            method="outputs",
            params=own.model_dump(mode="json"),
            inputs={"parent": self.latest["unpruned"], "healing": self.latest["healing"]},
            methods={"outputs": own},
            version=TEACHER.version,
            beside={"student": self.latest["checkpoint"]},
        )
        return self._once(stage)

    def _costs(self, asked: StageConfig, roles: set[str]) -> Stage:
        """The stage that measures costs for an allocate stage; one for all budgets."""
        ((name, params),) = asked.methods.items()
        used = [methods("allocate")[name], *(methods("quantize")[each] for each in _MEASURED_BY)]
        stage = Stage(
            verb="costs",
            label=self._label("costs"),
            method=name,
            params={name: params.model_dump(mode="json", exclude={*BUDGET})},
            inputs=self._inputs("allocate", roles),
            methods=asked.methods,
            version=sum(row.version for row in used),
        )
        return self._once(stage)

    def _once(self, stage: Stage) -> Stage:
        """A stage of this key that is planned already, or else this one."""
        known = (each for each in self.done if each.key == stage.key)
        return next(known, None) or self._add(stage)

    def _label(self, verb: str) -> str:
        before = sum(stage.verb == verb for stage in self.done)
        return f"{verb} {before + 1}" if before else verb

    def _cuts(self, taught: set[str]) -> dict[str, Stage]:
        """The selections that lead from a teacher to the checkpoint, in order."""
        prunes = [stage for stage in self.done if stage.verb == "prune"]
        since = prunes if "original" in taught else prunes[-1:] if "parent" in taught else []
        cuts = [stage.inputs["selection"] for stage in since if "selection" in stage.inputs]
        return {f"cut {number}": cut for number, cut in enumerate(cuts, 1)}

    def _welcome(self, asked: StageConfig) -> set[str]:
        """The role that a stage takes where it was made; scores only where it goes by one."""
        role = _WELCOMES.get(asked.verb, "")
        by_score = any("score" in type(given).model_fields for given in asked.methods.values())
        return {role} & self.latest.keys() if by_score or role != "scores" else set()

    def _inputs(self, verb: str, roles: set[str]) -> dict[str, Stage]:
        inputs = {"checkpoint": self.latest["checkpoint"]}
        for role in sorted(roles):
            if role not in self.latest:
                remedy = _REMEDIES.get(
                    role, f"add text.{role} to the configuration, or give --text"
                )
                raise ConfigError(
                    f"stage {verb!r} needs {role}, which nothing before it makes; {remedy}"
                )
            inputs[role] = self.latest[role]
        return inputs

    def _import(self, label: str, source: ModelSource) -> Stage:
        params = {"fingerprint": self.pins[label], "dtype": source.dtype}
        return self._add(Stage("model", label, "import", params, version=VERSIONS["model"]))

    def _add(self, stage: Stage) -> Stage:
        self.done.append(stage)
        return stage

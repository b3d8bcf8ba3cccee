"""The tasks that a base can be loaded for: transformers' class, the head, and PEFT's word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import transformers

from lorakit.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class ModelTask:
    """What a base is for a task."""

    auto_class: str
    """The class of transformers that loads it."""
    ending: str = ""
    """The end of the names of the classes of such models; "": of any others."""
    peft_type: str
    """PEFT's `task_type`."""
    reads_images: bool = False
    """Whether it takes images, which a processor makes ready, in the place of tokens."""
    has_classes: bool = False
    """Whether its head has an output for each class, which have names."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The settings of the model's config that shape its head."""

    def head_settings(self, labels: Sequence[str] | None) -> dict[str, Any]:
        """The settings of the model's config for these classes; None: those of the checkpoint."""
        if not self.has_classes or labels is None:
            return {} if self.has_classes else dict(self.config)
        return {
            **self.config,
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }


_SEQUENCE: dict[str, Any] = {
    "auto_class": "AutoModelForSequenceClassification",
    "ending": "ForSequenceClassification",
    "peft_type": "SEQ_CLS",
}
_MULTI_LABEL = "multi_label_classification"

TASKS: Mapping[str, ModelTask] = MappingProxyType(
    {
        "generation": ModelTask(auto_class="AutoModelForCausalLM", peft_type="CAUSAL_LM"),
        "classification": ModelTask(
            **_SEQUENCE, has_classes=True, config={"problem_type": "single_label_classification"}
        ),
        "regression": ModelTask(
            **_SEQUENCE, config={"num_labels": 1, "problem_type": "regression"}
        ),
        "multi-label": ModelTask(
            **_SEQUENCE, has_classes=True, config={"problem_type": _MULTI_LABEL}
        ),
        "token-classification": ModelTask(
            auto_class="AutoModelForTokenClassification",
            ending="ForTokenClassification",
            peft_type="TOKEN_CLS",
            has_classes=True,
        ),
        "question-answering": ModelTask(
            auto_class="AutoModelForQuestionAnswering",
            ending="ForQuestionAnswering",
            peft_type="QUESTION_ANS",
            config={"num_labels": 2},
        ),
        "embedding": ModelTask(auto_class="AutoModel", peft_type="FEATURE_EXTRACTION"),
        "image-classification": ModelTask(
            auto_class="AutoModelForImageClassification",
            ending="ForImageClassification",
            # PEFT has no word for it.
            peft_type="",
            reads_images=True,
            has_classes=True,
        ),
    }
)
"""The tasks by name."""

_ENCODER_DECODER = ModelTask(auto_class="AutoModelForSeq2SeqLM", peft_type="SEQ_2_SEQ_LM")
"""Generation by a model that reads a prompt with one stack and writes the answer with another."""


def model_task(task: str, config: transformers.PreTrainedConfig) -> ModelTask:
    """What a base with a config is for a task."""
    is_generation = task == "generation" and getattr(config, "is_encoder_decoder", False)
    return _ENCODER_DECODER if is_generation else TASKS[task]


def form_of(task: str, config: transformers.PreTrainedConfig) -> str | None:
    """The class of transformers that a base with a config is, for a task or PEFT's type of one.

    None: neither lorakit nor PEFT has such a task.
    """
    if task in TASKS:
        return model_task(task, config).auto_class
    every = [model_task(each, config) for each in TASKS]
    return next((each.auto_class for each in every if each.peft_type == task), None)


def task_of_config(architecture: str, config: transformers.PreTrainedConfig) -> str:
    """The task of a model by the name of its class and its config."""
    fitting = [
        name for name, task in TASKS.items() if task.ending and architecture.endswith(task.ending)
    ]
    if len(fitting) < 2:
        return next(iter(fitting), "generation")
    if config.problem_type == _MULTI_LABEL:
        return "multi-label"
    return "regression" if config.num_labels == 1 else "classification"


def is_encoder(config: transformers.PreTrainedConfig) -> bool:
    """Whether a base with a config reads a text at once, and has nothing that writes one."""
    # A class such as BertLMHeadModel alone does not: what makes its tokens see none that follow is
    # a switch of the config, which XLM calls causal.
    switches = ("is_encoder_decoder", "is_decoder", "causal")
    writes = any(getattr(config, switch, False) for switch in switches)
    return type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not writes


def check_does(name: str, config: transformers.PreTrainedConfig, task: str) -> None:
    """Make sure that a base writes texts, where the task is to.

    Args:
        name: of the base; "": it has none.
        config: its own.
        task: what it is for.

    Raises:
        ModelError: it is an encoder.
    """
    if task == "generation" and is_encoder(config):
        others = [each for each in TASKS if each != task and not TASKS[each].reads_images]
        raise ModelError(
            f"{name or 'the loaded model'} was asked for generation, the task of rows with a"
            f" prompt, and is an encoder ({config.model_type}), which reads a text at once and"
            " writes none: give a base that writes, such as smollm2, or another task and its rows"
            f" ({', '.join(others)})"
        )


def has_classes(task: str) -> bool:
    """Whether a task's labels are names of classes."""
    return TASKS[task].has_classes

"""Marks of settings: every setting of a run has been decided, and what the marks come to."""

from lorakit.config.base import Settings
from lorakit.config.marks import Mark, Shared, flat_settings, mark_of, settings_where
from lorakit.config.methods import LoRAConfig
from lorakit.config.train import TrainConfig
from lorakit.training.sweep.grid import SECTIONS, VARYING

METHODS = {"lora", "full", "bitfit", "prefix", "bottleneck"}
VARYING_OF_RUNS = {
    *("method", "steps", "epochs", "batch_size", "accumulate", "learning_rate", "lora_plus_ratio"),
    *("eva_batches", "warmup_steps", "schedule", "weight_decay", "adam_epsilon"),
    *("max_grad_norm", "label_smoothing", "z_loss", "seed", "eval_every", "patience"),
}
LIKE_THEIR_SECTION = {
    "lora": {
        *("rank", "alpha", "targets", "exclude", "layers", "dropout", "bias", "rank_pattern"),
        *("alpha_pattern", "use_rslora", "use_dora", "init", "svd_iterations", "eva_rho"),
        *(
            "ensure_weight_tying",
            "freeze_a",
            "lora_bias",
            "trainable_token_indices",
            "modules_to_save",
            "dtype",
        ),
    },
    "full": {"top", "blocks", "modules_to_save", "dtype"},
    "bitfit": {"add_missing", "modules_to_save", "dtype"},
    "prefix": {"prefix", "infix", "init", "blocks", "modules_to_save", "dtype"},
    "bottleneck": {
        *("size", "activation", "layer_norm", "train_norms", "layers", "dropped", "dropout", "at"),
        *("modules_to_save", "dtype"),
    },
    "data": {
        *("format", "fields", "delimiter", "separator", "max_length", "stride", "train_rows"),
        "labels",
    },
}
OF_ONE_CALL = {"out", "sweep", "resume", "keep_settings", "overwrite", "dry_run", "table"}
OF_ONE_CALL |= {"report_to", "ray", "ray_cpus"}


def test_every_setting_of_a_run_has_one_mark():
    marks = {
        name: [each for each in field.metadata if isinstance(each, Mark)]
        for name, field in TrainConfig.model_fields.items()
    }
    assert [name for name, found in marks.items() if len(found) != 1] == []


def test_a_setting_without_a_mark_does_not_vary_and_is_on_the_card():
    class Unmarked(Settings):
        size: int = 1

    assert mark_of(Unmarked, "size") == Mark(varies=False, on_card=True, compared=True)


def test_every_setting_of_a_section_has_its_mark_or_is_known_to_have_the_sections():
    without = {
        name: {
            each
            for each, field in section.model_fields.items()
            if not any(isinstance(one, Mark) for one in field.metadata)
        }
        for name, section in SECTIONS.items()
    }
    assert without == LIKE_THEIR_SECTION, "give a new setting a mark, or list it here"


def test_a_setting_of_a_section_may_have_another_mark(monkeypatch):
    class Section(Settings):
        free: int = 1
        fixed: Shared[int] = 2

    assert settings_where(Section, lambda mark: mark.varies, default=Mark(varies=True)) == ["free"]


def test_what_varies_between_trials_is_as_agreed():
    assert set(SECTIONS) == {*METHODS, "data"}
    assert {name for name in VARYING if "." not in name} == VARYING_OF_RUNS
    inner = {
        f"{name}.{each}" for name, section in SECTIONS.items() for each in section.model_fields
    }
    # It makes the base, which trials share.
    inner -= {"lora.layer_replication"}
    assert {name for name in VARYING if "." in name} == inner


def test_what_a_resumed_run_may_change_is_a_short_list():
    config = TrainConfig(out="run")
    names = {name for name, mark, _ in flat_settings(config) if mark.may_change}
    scored = {"eval_every", "patience"}
    scored |= {"data.validation", "data.validation_rows", "data.validation_every"}
    checks = {"check_after", "allow_untrained", "allow_other_base"}
    handled = {"save_every", "keep_checkpoints", "memory", "offload", "shard"}
    handled |= {"model", "data.train"}
    assert names == {"steps", "epochs"} | scored | checks | handled


def test_what_the_card_and_a_resumed_sweep_leave_out_is_as_agreed():
    off_card = settings_where(TrainConfig, lambda mark: not mark.on_card)
    in_sections = settings_where(LoRAConfig, lambda mark: not mark.on_card)
    assert in_sections == ["layer_replication"]
    assert set(off_card) == OF_ONE_CALL | METHODS | {
        "method",
        "data",
        "model",
        "task",
        "preference",
    }
    assert set(settings_where(TrainConfig, lambda mark: not mark.compared)) == OF_ONE_CALL

"""The recipe's sections of the model and of the run: training, with Hugging Face's names, evaluation, deployment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from luthier.data_options import Source
from luthier.decoding import BATCH_SIZE, Decoding
from luthier.section import Section, as_list


class ModelSection(Section):
    name: str = "smollm2"
    """An embedded model's name (`luthier models`), a local folder, a GGUF file or a Hugging Face hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the weights while training; auto: bfloat16 where the hardware multiplies it fast, else float32."""
    batching: Literal["auto", "packed", "padded"] = "auto"
    """How examples share a batch: packed end to end without padding, or right-padded; auto: packed where the model
    proves that it can."""
    chat_template: str | None = None
    """A Jinja file to use in place of the model's own chat template."""
    added_tokens: list[str] = Field(default_factory=list)
    """New tokens to add to the vocabulary and train."""


class TrainingSection(Section):
    num_train_epochs: float = Field(3.0, gt=0)
    """Passes over the training rows."""
    max_steps: int = Field(-1, ge=-1)
    """Optimiser steps in all; -1: as the epochs say."""
    per_device_train_batch_size: int = Field(4, ge=1)
    """Examples in one forward pass."""
    per_device_eval_batch_size: int = Field(8, ge=1)
    """Examples in one forward pass of validation."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Forward passes in one optimiser step."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate; empty: the method's default (LoRA 2e-4, full 2e-5)."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    """Share of the steps over which the learning rate rises from zero."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of warm-up; where above zero it wins over warmup_ratio."""
    weight_decay: float | None = Field(None, ge=0)
    """AdamW's decay of matrices (never of norms and biases); empty: the method's default (LoRA 0, full 0.01)."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's first moment decay."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's second moment decay."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """AdamW's denominator offset."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this norm; 0: never."""
    gradient_checkpointing: Literal[False, True, "mlp"] = False
    """Recompute in the backward pass instead of keeping: true: whole layers, a third slower, far less memory; mlp: the
    inner values of each layer's MLP alone, the widest ones, for half of that time; whole layers where they aren't
    fused."""
    share_prefix: Literal["auto", "never"] = "auto"
    """Rows of a batch that begin with the same tokens (system text, tools, few-shot examples) compute them once, with
    the same gradients; auto: where at least 16 tokens are shared. Rows then share one dropout mask there."""
    sharding: Literal["none", "full"] = "none"
    """How several processes hold the model: each the whole of it, or each a piece of every weight, gradient and moment
    (FSDP2); one process always has the whole."""
    logging_steps: int = Field(1, ge=1)
    """Steps between lines of metrics.jsonl."""
    eval_steps: int | None = Field(None, ge=1)
    """Steps between validations; empty: ten times a run, and at its end."""
    save_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints; empty: at every validation."""
    save_total_limit: int = Field(2, ge=1)
    """Newest checkpoints kept; the best one is kept besides."""
    predict_with_generate: bool = False
    """At each validation let the model answer some validation rows as well, and score the answers."""
    generation_examples: int = Field(32, ge=1)
    """How many it answers, of the first ones; evaluation.max_new_tokens is the longest answer."""
    metric_for_best_model: str = "loss"
    """What says which validation is best: the loss, or a metric of those answers (json_exact, rougeL and others,
    docs/evaluation.md), where the loss decides between equal ones."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after so many validations without a better one."""
    load_best_model_at_end: bool = True
    """Save the weights of the best validation, not the last ones."""
    report_to: list[str] = Field(default_factory=lambda: ["tensorboard"])
    """Trackers of Accelerate: tensorboard, wandb, mlflow, comet_ml, aim, clearml, dvclive, swanlab, trackio."""

    _listed = field_validator("report_to", mode="before")(as_list)


class JudgeSection(Section):
    endpoint: str | None = None
    """Address of an OpenAI-compatible server, up to and with /v1, where a model says which of two answers is better;
    empty: nobody does."""
    model: str | None = None
    """The judge's name there."""
    api_key_env: str | None = None
    """Environment variable that holds the key; empty: no key is sent."""
    prompt: str | None = None
    """A file with another prompt than luthier's; it has {question}, {answer_a}, {answer_b}; {reference} if wanted."""
    examples: int | None = Field(None, ge=1)
    """Rows that are judged, of the first ones, by two requests for each model; empty: all."""
    max_tokens: int = Field(2048, ge=1)
    """Longest reply, in tokens."""


class EvaluationSection(Section):
    enabled: bool = True
    """Compare base and tuned on the test rows after training."""
    max_examples: int | None = Field(200, ge=1)
    """Test rows to generate answers for; empty: all."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer, in tokens."""
    batch_size: int = Field(BATCH_SIZE, ge=1)
    """Prompts answered at once, fewer where memory would not suffice; with beams, beams."""
    do_sample: bool = False
    """Draw tokens by chance, from the recipe's seed and each prompt; false: the likeliest ones."""
    temperature: float = Field(1.0, gt=0)
    """With do_sample: logits are divided by it; below 1 likely tokens become likelier."""
    top_k: int = Field(0, ge=0)
    """With do_sample: draw among so many likeliest tokens; 0: among all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """With do_sample: draw among the fewest likeliest tokens whose probabilities sum to this; 1: among all."""
    num_beams: int = Field(1, ge=1)
    """Beginnings of an answer that are followed at once; 1: no beam search."""
    length_penalty: float = 1.0
    """With beams: a beam's log-probability is divided by its length to this power; above 0 favours long answers."""
    no_repeat_ngram_size: int = Field(0, ge=0)
    """No run of so many tokens comes twice in a prompt with its answer; 0: no limit."""
    resume: bool = True
    """Take up answers that an interrupted evaluation has kept; false: ask everything anew."""
    samples: int = Field(3, ge=0)
    """Answers shown side by side."""
    metrics: list[str] = Field(default_factory=list)
    """Metrics beside those that apply to the right answers: a name (docs/evaluation.md), or a function of yours as
    file.py:function."""
    harm: bool = False
    """Measure what tuning has cost as well: forgetting, memorisation, refusals, answers in another language. It takes
    about as long as the comparison; `luthier evaluate RUN --harm` does it later."""
    general: list[Source] = Field(default_factory=list)
    """Rows that should not be forgotten either, beside the general set that comes with luthier; with harm."""
    judge: JudgeSection = Field(default_factory=JudgeSection)
    """A model that judges the answers of base and tuned, in both orders."""

    _listed = field_validator("general", mode="before")(as_list)

    @model_validator(mode="after")
    def _can_be_decoded(self) -> EvaluationSection:
        self.decoding(0)
        return self

    def decoding(self, seed: int) -> Decoding:
        """How answers are made.

        Raises:
            UserError: two of the options exclude each other.
        """
        return Decoding(
            do_sample=self.do_sample,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=seed,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
        )


class DeploymentSection(Section):
    merge: bool = False
    """Merge the adapter into the base after training, behind the parity gate, into OUTPUT_DIR/merged."""

"""What a recipe says: plain dataclasses, one field per setting, checked by `qat.recipes.checks`.

They are also OmegaConf's structured schema, for 2.3 as well as 2.4: hence no frozen classes (2.3 cannot merge them), no
Literal and no Union of classes. Rules and phases are mappings by name, so that an override can address one
(`rules.linears.weight.bits=3`) and an error can name it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Slot:
    """The numbers of one tensor of a layer, weight, input, output or cache; the words are those of
    `qat.specs.QuantSpec`."""

    # Bits of a code, 1..8.
    bits: int = 8
    # Numbers that share one scale. Weights: tensor | channel | group; inputs: tensor | token | group, of a token;
    # outputs: token | group; caches: tensor | token | group, of a head's token.
    granularity: str = "channel"
    # Numbers of a row in one group, with granularity=group only; has to divide the inputs of a row.
    group_size: int | None = None
    # none: code * scale | int: (code - zero_point) * scale | float: code * scale + minimum
    zero_point: str = "none"
    # Leave out the most negative code: -127..127 instead of -128..127.
    narrow: bool = False
    # How a scale is stored: portable | fp32 | fp16 | bf16 | e8m0, powers of two; for weights also as a code times a
    # scale that groups share: q2_k | q3_k | q4_k | q5_k | q6_k, ggml's k-quants | iq4_xs, ggml's too, for grid=iq4_nl |
    # nvfp4, as TensorRT-LLM has it, nvfp4_over, as compressed-tensors has it, or nvfp4_portable, as both have it (these
    # three for inputs too) | bnb_nested, double quantization of bitsandbytes | exl2, squared codes times a scale of all
    # rows, as exllamav2 has it.
    scale: str = "portable"
    # How a scale is found. Weights: absmax | minmax | mse | lsq | lsq_plus, with a learned zero point | dual_lsq, one
    # scale for the codes and one for the numbers, for grids other than integers | ewgs and quest, other gradients of
    # the weight | absmean, for grid=ternary; inputs: absmax | minmax | lsq | lsq_plus | pact | ema
    # | local, for the scales nvfp4: those of blocks from each input, the tensor's from an average.
    quantizer: str = "absmax"
    # Which codes exist. int: consecutive integers | ternary: -1, 0, 1 (2 bits) | seq: -3/4, -1/4, 1/4, 3/4 of the scale
    # (2 bits) | binary: -1, 1 (1 bit) | nf4, iq4_nl: tables of 16 levels (4 bits) | fp4: floats e2m1 (4 bits)
    # | bnb_fp4: the other 4-bit float, of bitsandbytes | e4m3, e5m2: floats (8 bits).
    grid: str = "int"
    # A scale may be negative, which gives the extra negative code of a signed grid, or the longer side of iq4_nl, to
    # either side; for quantizer=mse and lsq and formats that store the sign (GGUF Q4_0, IQ4_NL).
    signed_scale: bool = False
    # Share of the numbers that a range holds, in %, above 50; of the magnitudes where there is no zero point. For
    # quantizer=lsq it is the range at the start, for ema that of each step's inputs. null: the range of least squared
    # error for lsq, all of the numbers for ema.
    percentile: float | None = None
    # Groups of a weight are of inputs in an order that is kept with it, for the format gptq: that of a GPTQ file
    # (init.file), or the largest inputs first (init.method=gptq or gptq_latent); else the inputs stay as they are.
    desc_act: bool = False
    # null: signed with zero_point=none, unsigned otherwise.
    signed: bool | None = None

    @property
    def is_signed(self) -> bool:
        """`signed` with null resolved."""
        return self.zero_point == "none" if self.signed is None else self.signed

    def spec_fields(self) -> dict[str, Any]:
        """The keyword arguments of `qat.specs.QuantSpec`."""
        return {
            "bits": self.bits,
            "signed": self.is_signed,
            "narrow": self.narrow,
            "granularity": self.granularity,
            "group_size": self.group_size,
            "zero_point": self.zero_point,
            "scale": self.scale,
            "quantizer": self.quantizer,
            "kind": self.grid,
            "signed_scale": self.signed_scale,
            "percentile": self.percentile,
            "desc_act": self.desc_act,
        }


@dataclass
class Rule:
    """Which layers, and what they get. The last rule that matches replaces a slot (weight, input, ...) whole."""

    # Names of modules: globs over the whole dotted name ("*mlp*"), or "re:" and a regular expression.
    match: list[str] = field(default_factory=lambda: ["*"])
    # Short class names ("Linear", "Conv2d"); empty: every class that can be quantized.
    types: list[str] = field(default_factory=list)
    weight: Slot | None = None
    input: Slot | None = None
    # Of what a layer gives; scales of each token.
    output: Slot | None = None
    # Of attention (types: Attention): keys, after their rotation, and values as its cache keeps them, in training too;
    # one scale for the keys and one for the values with granularity=tensor.
    cache: Slot | None = None
    # How the gradients' matmuls of Linear run: float | int8, in 8-bit integers with stochastic rounding | int8_dgrad,
    # that for the gradient of the input only. null: as the rule before says, float if none does.
    backward: str | None = None
    # A rule that matches nothing is an error unless this is true.
    optional: bool = False
    # Leave the matches in float, on purpose and listed in the plan.
    keep_float: bool = False


@dataclass
class Phase:
    """A stretch of optimizer steps in which the same things are active."""

    # Optimizer steps; of the last phase -1, until training ends, or 0: nothing is trained, only `init` is done.
    steps: int = -1
    # false: the model computes in float.
    quantize: bool = True
    # Steps in which the quantization fades in from none to full strength.
    ramp: int = 0
    # What learns. all | scales: the learned scales alone, under codes that stay, as EfficientQAT ends; weights need no
    # gradient and no optimizer state then. For all phases or none.
    train: str = "all"
    # Learned scales and running ranges stop moving.
    freeze_scales: bool = False
    # Batch norms use and keep their running statistics, in training too, so that the weights learn under those that are
    # deployed.
    freeze_batch_norm: bool = False
    # A weight whose code turns back in more than this share of the steps (a moving average over about 100) is frozen
    # on the code where it is on the average (Nagel et al. 2022: from 0.1 down to 0.01 at 4 bits); 0: none is.
    freeze_oscillating: float = 0.0
    # Strength of a loss that draws weights onto their codes: this times the sum of (w - w_hat)^2; 0: none.
    dampen: float = 0.0
    # Weight bits of a rule during this phase, by the rule's name; other rules use their own.
    bits: dict[str, int] = field(default_factory=dict)


@dataclass
class Init:
    """What the weights start from, found on training batches before the first step."""

    # none: the weights as they are | gptq: rounded by GPTQ, which makes good for each error with the weights that are
    # left | gptq_latent: the same codes, from GPTQ's weights as they were before they were rounded | blockwise: weights
    # and scales of one block after the other, trained until it answers as the float model's does
    method: str = "none"
    # Training batches that are looked at.
    batches: int = 16
    # Added to the diagonal of the inputs' second moments, as a share of its mean.
    damp: float = 0.01
    # Weights with the largest inputs are rounded first.
    act_order: bool = True
    # Scales are searched for the error that the inputs see, not for that of the weights; with method=none, too.
    weighted: bool = False
    # GGUF file with llama.cpp's importance matrix of this model, in place of batches; with method=none, weighted=true.
    imatrix: str | None = None
    # Folder of a packed model (any format that qat reads, whoever wrote it) whose codes and scales are the start; with
    # method=none.
    file: str | None = None
    # Of blockwise: how often a block sees all batches, and the learning rate, which falls along a cosine.
    epochs: int = 4
    lr: float = 1.0e-4

    @property
    def looks(self) -> bool:
        """Whether anything is done beyond the search of scales on the weights."""
        return self.method != "none" or self.weighted or self.file is not None


@dataclass
class Network:
    """Where a network's parts are, for `fold`. Names of modules; "*" stands for one part of a dotted name, the same one
    in names that belong together ("blocks.*.norm": ["blocks.*.up"])."""

    # What adds to the residual stream: embeddings, linears, parameters.
    writes: list[str] = field(default_factory=list)
    # Norm -> the linears that read what it gives, all of them.
    reads: dict[str, list[str]] = field(default_factory=dict)
    # Linear that makes the values of attention -> the linear that reads the heads' outputs.
    values: dict[str, str] = field(default_factory=dict)
    # Linear -> the linear that reads its output multiplied with something else (gated MLPs: up -> down).
    products: dict[str, str] = field(default_factory=dict)
    # Features of a head, to rotate values; null: as the model's config says.
    head_dim: int | None = None


@dataclass
class Fold:
    """A change of the float model that leaves its function as it is and makes it easier to quantize; done once, before
    training."""

    # none | rotate: random Hadamard matrices on the residual stream and on the heads' values, which spread outliers
    # over all channels (RMSNorm only; a head tied to the embedding becomes a matrix of its own) | smooth: SmoothQuant,
    # inputs with outliers are divided and the weights after them multiplied | awq: AWQ, the same with the powers of the
    # inputs' mean size that quantize best
    method: str = "none"
    # Of the random signs; rotate only.
    seed: int = 0
    # How much of the range goes from the inputs to the weights, 0..1; smooth only.
    alpha: float = 0.5
    # Training batches that are looked at; smooth and awq only.
    batches: int = 16
    # null: known by the architecture (Llama, Mistral, Qwen2, Qwen3).
    network: Network | None = None


@dataclass
class BatchNorm:
    """Batch norms of a network at few bits, whose running statistics lag behind the codes."""

    # Training batches from which statistics are found anew before each validation, before a phase freezes them, and at
    # the end of training; 0: they stay as training left them. Nagel et al. 2022 take 50.
    reestimate: int = 0
    # Batch norms become part of the quantized layers before them: rounded is w * gamma / sqrt(variance + eps), and what
    # is exported has no norm. Needs freeze_batch_norm: true in the last phase.
    fold: bool = False
    # Layer -> the batch norm after it; "*" stands for one part of a dotted name, the same one in both. {}: each layer
    # with a quantized weight after which its module lists a batch norm.
    pairs: dict[str, str] = field(default_factory=dict)


@dataclass
class Distill:
    """Learning from the float model."""

    enabled: bool = False
    # Share of the distillation loss, 0..1; the rest is the loss of the task. 1 is distillation alone.
    weight: float = 1.0
    # kl: token-mean KL(float || quantized) of the logits | kl_topk: of the likeliest 256 and the rest, for large
    # vocabularies | cakld: both directions, mixed by the float model's confidence | mse | cosine, for embeddings
    loss: str = "kl"
    temperature: float = 1.0
    # Weight of the relative squared error of the hidden states between blocks, added to the loss; 0: not looked at.
    hidden: float = 0.0
    # null: the float model itself as it was before quantization; else a folder that holds a model.
    teacher: str | None = None


@dataclass
class Export:
    """File formats that have to hold the recipe's grids exactly; checked before training."""

    targets: list[str] = field(default_factory=list)


@dataclass
class Train:
    """What `qat train` needs; a recipe used through a callback in a script of one's own leaves it alone."""

    # causal_lm | image_classification | sentence_embedding
    task: str = "causal_lm"
    # Folder of a model; its own library loads it. null: has to be given on the command line.
    model: str | None = None
    # The weights lie in files below `out` instead of memory, in fp32, for a model that memory does not hold: for
    # task=causal_lm on a CPU, without training (steps of the last phase 0). No checkpoint is written.
    offload: bool = False
    # Folder of the tokenizer; null: the model's folder.
    tokenizer: str | None = None
    # Files or folders to train on: text, jsonl or parquet, images in one folder per label.
    data: list[str] = field(default_factory=list)
    # The same to validate on; empty: val_fraction of `data`.
    val_data: list[str] = field(default_factory=list)
    val_fraction: float = 0.05
    # Where a record of jsonl or parquet keeps its text, its chat messages, its image and its label.
    text_key: str = "text"
    chat_key: str = "messages"
    image_key: str = "image"
    label_key: str = "label"
    # Tokens of one training sequence.
    seq_len: int = 512
    batch_size: int = 8
    # Batches of one optimizer step.
    accumulate: int = 1
    lr: float = 1.0e-5
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    # Share of max_steps in which the learning rate rises from 0.
    warmup_fraction: float = 0.05
    # cosine: to zero at max_steps | constant
    scheduler: str = "cosine"
    # Optimizer steps.
    max_steps: int = 1000
    # Optimizer steps between validations.
    val_every: int = 100
    # Largest norm of the gradient; 0: not clipped.
    gradient_clip: float = 1.0
    # 32-true | 16-mixed | bf16-mixed | bf16-true | 64-true
    precision: str = "32-true"
    # The trainer's words: auto | cpu | gpu | ..., auto | a number | a list like "0,1", auto | ddp | fsdp | ...
    accelerator: str = "auto"
    devices: str = "auto"
    strategy: str = "auto"
    num_nodes: int = 1
    seed: int = 0
    # Processes that load data; 0: the training process itself.
    num_workers: int = 0
    # none | csv | wandb
    logger: str = "none"
    # Folder for everything that a run writes; null becomes runs/<name of the recipe> when a recipe is read.
    out: str | None = None
    # Checkpoint to go on from.
    resume: str | None = None


@dataclass
class Recipe:
    """Everything that turns a float model into an exported one; pure data."""

    # Letters, digits, ".", "_" and "-"; names the run's folder.
    name: str = "recipe"
    description: str = ""
    # true: anything left in float without a keep_float rule is an error.
    strict: bool = False
    # Name -> rule, in order; later wins per slot. A rule set to null is removed.
    rules: dict[str, Rule] = field(default_factory=dict)
    # Name -> phase, in order. A phase set to null is removed.
    phases: dict[str, Phase] = field(default_factory=lambda: {"qat": Phase()})
    fold: Fold = field(default_factory=Fold)
    init: Init = field(default_factory=Init)
    batch_norm: BatchNorm = field(default_factory=BatchNorm)
    distill: Distill = field(default_factory=Distill)
    export: Export = field(default_factory=Export)
    train: Train = field(default_factory=Train)

    @property
    def trains_nothing(self) -> bool:
        """Whether a run is over before its first step: `init`, export, no training."""
        return list(self.phases.values())[-1].steps == 0

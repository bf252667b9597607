"""Trains tiny on made-up scenes, in pieces: run it again and it goes on where it stopped.

python -m pasa_jax.models.tiny.train --out runs/tiny --minutes 9
"""

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

from pasa_jax.models.tiny import codec, scenes, text
from pasa_jax.models.wan import ROPE_THETA, Wan, WanConfig

AVERAGE_DECAY = 0.998  # of the parameters that are shipped
LOG_STEPS = 50
LOUDNESS = 1.5  # of the constant channels a token starts with
NEARNESS = 2.0  # how strongly heads start to look near, in standard deviations of their queries
_NEAR = ((0, 1, 1), (1, 1, 0), (1, 0, 1), (1, 1, 1))  # axes (frames, rows, columns) of each kind
NULL_SHARE = 0.1  # prompts replaced by "no prompt", for guidance


class Stage(NamedTuple):
    """Part of the schedule.

    Attributes:
        steps: how many.
        grids: token grids (frames, rows, columns), taken in turn.
        tokens: in a step, at most; a grid's batch is as many videos as fit, at least one.
    """

    steps: int
    grids: tuple[tuple[int, int, int], ...]
    tokens: int


# Small grids first: steps are what teaches, and a pixel means the same on every grid. The larger
# ones then teach the rotary positions that the default video needs.
SCHEDULE = (
    Stage(5000, ((2, 8, 8),), 1024),
    Stage(2200, ((2, 8, 8), (4, 10, 10), (2, 12, 12)), 1200),
    Stage(1300, ((4, 16, 16), (4, 10, 10), (2, 12, 12)), 2048),
)


# What a diffusers pipeline folder says about itself; steps and guidance are tiny's defaults.
MODEL_INDEX = {
    "_class_name": "WanPipeline",
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["pasa_jax.models.tiny.text", "TextEncoder"],
    "vae": ["pasa_jax.models.tiny.codec", "Codec"],
    "num_inference_steps": 20,
    "guidance_scale": 4.0,
}
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of the training command.

    Attributes:
        out: folder of the run: checkpoints, history.json, loss.png.
        minutes: stop after this long, the last checkpoint written; run again to go on.
        export: write the averaged weights here, laid out as a diffusers pipeline, and stop.
        seed: of the weights and of every batch.
        start: begin from these weights, laid out as a pipeline, in place of random ones.
        scale: multiplies the steps of every stage; decided when a run begins.
        learning_rate: of Muon, for the matrices of the layers.
        adam_learning_rate: of Adam, for everything else.
    """

    out: Path
    minutes: float = 9.0
    export: Path | None = None
    seed: int = 0
    start: Path | None = None
    scale: float = 1.0
    learning_rate: float = 0.02
    adam_learning_rate: float = 2e-3

    def __post_init__(self):
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale={self.scale} must be positive and finite")

    @property
    def schedule(self) -> tuple[Stage, ...]:
        """The stages of this run."""
        return tuple(stage._replace(steps=round(stage.steps * self.scale)) for stage in SCHEDULE)


def architecture() -> WanConfig:
    """tiny's transformer."""
    return WanConfig(
        in_channels=codec.CHANNELS,
        out_channels=codec.CHANNELS,
        patch=(1, 2, 2),
        dim=128,
        num_heads=4,
        num_layers=4,
        ffn_dim=512,
        freq_dim=256,
        text_dim=64,
        text_len=text.MAX_WORDS,
        eps=1e-6,
    )


def init_params(config: WanConfig, seed: int):
    """The transformer's graph, and its parameters with those of the text table."""
    model = Wan(config, dtype=jnp.float32, rngs=nnx.Rngs(seed))
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Linear):
            module.dot_general = _flat_product
    graph, params = nnx.split(model, nnx.Param)
    rng = np.random.default_rng(seed)
    # Wan starts these at 0.02, too narrow for a model so small to learn quickly.
    for name in ("text_in", "text_out", "time_in", "time_out"):
        kernel = params[name]["kernel"]
        shape = kernel.get_value().shape
        kernel.set_value(jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32))
    _pass_through(params, config)
    _look_near(params["blocks"]["self_attn"], config)
    words = rng.normal(size=(len(scenes.WORDS) + 1, config.text_dim))
    places = rng.normal(size=(text.MAX_WORDS, config.text_dim))
    table = {"words": jnp.asarray(words, jnp.float32), "places": jnp.asarray(places, jnp.float32)}
    return graph, {"wan": nnx.to_pure_dict(params), "text": table}


def _flat_product(x, kernel, *_args, **_options):
    """x @ kernel over one flat axis of rows, whose gradient is quicker on a CPU."""
    product = x.reshape(-1, x.shape[-1]) @ kernel
    return product.reshape(*x.shape[:-1], -1)


def read_params(folder: Path):
    """The parameters of `init_params` from a folder that `export` wrote."""
    # The converter stands above the models; only the training command needs it.
    from pasa_jax.convert import load_model

    model = load_model(folder / "transformer", "float32")
    table = jax.tree.map(jnp.asarray, vars(text.load(folder / "text_encoder")))
    return {"wan": nnx.to_pure_dict(nnx.state(model, nnx.Param)), "text": table}


def _pass_through(params, config: WanConfig) -> None:
    """Starts with the token's own numbers in the first channels and at the head, gates open.

    A constant in the other channels keeps the last norm from losing how loud a token is.
    """
    numbers = math.prod(config.patch) * config.in_channels
    eye = np.eye(numbers, config.dim, dtype=np.float32)
    constant = np.where(np.arange(config.dim) % 2, LOUDNESS, -LOUDNESS) * (1 - eye.sum(0))
    params["patch_embedding"]["kernel"].set_value(jnp.asarray(eye))
    params["patch_embedding"]["bias"].set_value(jnp.asarray(constant, jnp.float32))
    params["head"]["kernel"].set_value(jnp.asarray(eye.T))
    modulation = params["blocks"]["modulation"]
    gates = jnp.asarray([0, 0, 1, 0, 0, 1], jnp.float32)[None, :, None]
    modulation.set_value(modulation.get_value() + gates)


def _look_near(attention, config: WanConfig) -> None:
    """Starts every head with a place to look at: near in the axes of its kind, anywhere in others.

    The query and key biases get the same vector, so that after rotation their product depends on
    the distance alone. Chosen by argument; a run without it was not compared.
    """
    pairs = config.head_dim // 2
    shares = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    frequencies = [ROPE_THETA ** (-np.arange(share) / share) for share in shares]
    bias = np.zeros((config.num_layers, config.num_heads, 2, pairs), np.float32)
    for layer, head in np.ndindex(bias.shape[:2]):
        near = _NEAR[(layer * config.num_heads + head) % len(_NEAR)]
        bias[layer, head, 0] = np.concatenate(
            [NEARNESS * on * (f > 0.05) for on, f in zip(near, frequencies, strict=True)]
        )
    bias = jnp.asarray(bias.reshape(config.num_layers, config.dim))
    attention["q"]["bias"].set_value(bias)
    attention["k"]["bias"].set_value(bias)


def matrices(params):
    """Muon's axes for the stacked matrices of the layers, None (Adam) for the rest."""

    def axes(path, leaf):
        names = [str(getattr(key, "key", key)) for key in path]
        if "blocks" in names and names[-1] == "kernel":
            return optax.contrib.MuonDimensionNumbers(1, 2)
        return None

    return jax.tree_util.tree_map_with_path(axes, params)


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """Muon and Adam, 100 steps of warm-up, linear decay over the last 40 %."""

    def rate(peak):
        warm, flat = 100, int(0.6 * steps)
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, warm),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, 0.02 * peak, steps - flat),
            ],
            [warm, flat],
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            rate(config.learning_rate),
            adam_learning_rate=rate(config.adam_learning_rate),
            adam_b2=0.98,
            muon_weight_dimension_numbers=matrices,
        ),
    )


def make_batch(encode, grid, batch: int, seed):
    """Latents, word ids, noise and noise levels' base of one step; all from the seed."""
    rng = np.random.default_rng(seed)
    frames, height, width = (n * p for n, p in zip(grid, (4, 8, 8), strict=True))
    ids, videos = [], []
    for _ in range(batch):
        scene = scenes.random_scene(rng)
        ids.append(text.word_ids("" if rng.random() < NULL_SHARE else scene.prompt))
        videos.append(scenes.render(scene, frames, height, width, int(rng.integers(2**31))))
    latents = encode(np.stack(videos))
    noise = rng.standard_normal(latents.shape, np.float32)
    even = (rng.permutation(batch) + rng.random(batch)) / batch  # stratified in (0, 1)
    return latents, np.stack(ids), noise, even.astype(np.float32)


def noise_shift(grid) -> float:
    """Shift of the noise levels: 3 at 128 tokens, more where more tokens outvote the noise."""
    return 3.0 * (math.prod(grid) / 128) ** 0.25


def loss_of(params, graph, latents, ids, noise, even, shift):
    """Mean squared error of the velocity."""
    sigma = shift * even / (1 + (shift - 1) * even)
    level = sigma[:, None, None, None, None]
    table = params["text"]
    states = table["words"][ids] + table["places"][None]
    states = jnp.where((ids == text.PAD)[..., None], jnp.float32(0), states)
    model = nnx.merge(graph, params["wan"])
    velocity, _ = model((1 - level) * latents + level * noise, 1000 * sigma, states)
    return jnp.mean((velocity - (noise - latents)) ** 2)


class TrainState(NamedTuple):
    """What a checkpoint holds: parameters, the optimizer's state, and the averaged parameters."""

    params: Any
    optimizer: Any
    average: Any


def make_step(graph, optimizer):
    """One jitted update: state, step number and a batch → state and the loss."""

    def update(state, number, latents, ids, noise, even, shift):
        loss, gradients = jax.value_and_grad(loss_of)(
            state.params, graph, latents, ids, noise, even, shift
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(AVERAGE_DECAY, (1 + number) / (10 + number))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, params)
        return TrainState(params, optimizer_state, average), loss

    return jax.jit(update, donate_argnums=0)


def stage_at(schedule: tuple[Stage, ...], step: int) -> tuple[int, Stage]:
    """The stage a step belongs to, and its number."""
    ends = np.cumsum([stage.steps for stage in schedule])
    number = int(np.searchsorted(ends, step, side="right"))
    return number, schedule[number]


def batch_at(encode, config: TrainConfig, step: int):
    """The batch of a step: grid, and what `make_batch` gives."""
    _, stage = stage_at(config.schedule, step)
    grid = stage.grids[step % len(stage.grids)]
    batch = max(1, stage.tokens // math.prod(grid))
    return grid, make_batch(encode, grid, batch, (config.seed, step))


def train(config: TrainConfig) -> None:
    """Goes on with the run in `config.out` until its time is over or the schedule's end."""
    total = sum(stage.steps for stage in config.schedule)
    config.out.mkdir(parents=True, exist_ok=True)
    graph, params = init_params(architecture(), config.seed)
    if config.start is not None:
        params = read_params(config.start)
    optimizer = make_optimizer(config, total)
    # Copies: the update donates the state, which must not hold one array twice.
    state = TrainState(params, optimizer.init(params), params)
    state = jax.tree.map(jnp.copy, state)
    history = History.read(config.out / "history.json")
    with ocp.CheckpointManager(
        (config.out / "checkpoints").absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=2),
    ) as manager:
        step = manager.latest_step() or 0
        if step:
            state = manager.restore(step, args=ocp.args.StandardRestore(state))
            state = jax.tree.map(jnp.asarray, state)
        history.forget_after(step)
        state, step = _run(config, graph, optimizer, state, step, total, history)
        if step != manager.latest_step():
            manager.save(step, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    history.write(config.out / "history.json", config.schedule)
    plot(history, config.out / "loss.png")
    if step < total:
        print(f"stopped at step {step} of {total}; the same command goes on from here")
    else:
        print(f"all {total} steps done; --export DIR writes the weights")


def _run(config, graph, optimizer, state, step, total, history):
    """Steps until the time is over; returns the state and the step reached."""
    encode = jax.jit(codec.fit().encode)
    update = make_step(graph, optimizer)
    begin = mark = time.monotonic()
    losses = []
    with tqdm(total=total, initial=step, desc="training tiny", unit="step") as bar:
        while step < total and time.monotonic() - begin < 60 * config.minutes:
            grid, batch = batch_at(encode, config, step)
            state, loss = update(state, jnp.float32(step), *batch, noise_shift(grid))
            losses.append(float(loss))
            step += 1
            bar.update()
            if step % LOG_STEPS == 0:
                now = time.monotonic()
                history.add(step, float(np.mean(losses)), (now - mark) / 60)
                bar.set_postfix(loss=f"{np.mean(losses):.3f}", grid="x".join(map(str, grid)))
                losses, mark = [], now
    return state, step


@dataclasses.dataclass
class History:
    """Loss over the run, an entry every LOG_STEPS steps: its last step, mean loss, minutes."""

    steps: list[int] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    minutes: list[float] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "History":
        """What `write` wrote; an empty history where there is none."""
        return cls(**json.loads(path.read_text())["curve"]) if path.exists() else cls()

    def add(self, step: int, loss: float, minutes: float) -> None:
        """Appends an entry."""
        self.steps.append(step)
        self.losses.append(round(loss, 4))
        self.minutes.append(round(minutes, 3))

    def forget_after(self, step: int) -> None:
        """Drops entries of steps that no checkpoint kept."""
        keep = sum(s <= step for s in self.steps)
        self.steps, self.losses, self.minutes = (
            values[:keep] for values in (self.steps, self.losses, self.minutes)
        )

    def write(self, path: Path, schedule: tuple[Stage, ...]) -> None:
        """Writes the curve, and a summary of every stage, as JSON."""
        record = {"stages": self.stages(schedule), "curve": vars(self)}
        path.write_text(json.dumps(record) + "\n")

    def stages(self, schedule: tuple[Stage, ...]) -> list[dict]:
        """Steps, videos, minutes and last loss of each stage begun."""
        table = []
        for number, stage in enumerate(schedule):
            rows = [
                (loss, minutes)
                for step, loss, minutes in zip(self.steps, self.losses, self.minutes, strict=True)
                if stage_at(schedule, step - 1)[0] == number
            ]
            if rows:
                steps = len(rows) * LOG_STEPS
                batches = [max(1, stage.tokens // math.prod(grid)) for grid in stage.grids]
                videos = steps * sum(batches) / len(batches)
                table.append(
                    {
                        "grids": stage.grids,
                        "steps": steps,
                        "videos": round(videos),
                        "minutes": round(sum(minutes for _, minutes in rows), 1),
                        "last_loss": rows[-1][0],
                    }
                )
        return table


def plot(history: History, path: Path) -> None:
    """Draws the loss over the steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(history.steps, history.losses, linewidth=1)
    axes.set(xlabel="step", ylabel="loss (velocity, mean square)", yscale="log")
    axes.set_title("training of tiny; the loss of larger grids is lower for the same quality")
    figure.savefig(path, dpi=100)


def export(config: TrainConfig) -> None:
    """Writes the last checkpoint's averaged weights as a diffusers pipeline.

    Raises:
        ValueError: the run has no checkpoint.
    """
    # As in `read_params`.
    from pasa_jax.convert.checkpoint import export_diffusers

    graph, params = init_params(architecture(), config.seed)
    optimizer = make_optimizer(config, 1000)
    with ocp.CheckpointManager((config.out / "checkpoints").absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            raise ValueError(f"out={str(config.out)!r} must hold a checkpoint; train first")
        shapes = TrainState(params, optimizer.init(params), params)
        average = manager.restore(step, args=ocp.args.StandardRestore(shapes)).average
    folder = config.export
    export_diffusers(nnx.merge(graph, average["wan"]), folder / "transformer")
    table = jax.tree.map(np.asarray, average["text"])
    text.save(text.TextEncoder(**table), folder / "text_encoder")
    codec.save(codec.fit(), folder / "vae")
    (folder / "scheduler").mkdir(exist_ok=True)
    for name, content in (
        ("model_index.json", MODEL_INDEX),
        ("scheduler/scheduler_config.json", SCHEDULER),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    for name in ("history.json", "loss.png"):
        shutil.copy(config.out / name, folder / name)
    print(f"wrote step {step} to {folder}")


def main(config: TrainConfig) -> None:
    """Trains, or exports."""
    if config.export is None:
        train(config)
    else:
        export(config)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(TrainConfig, description=__doc__))

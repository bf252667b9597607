"""The grid of video tokens: its size from a video's size, and blocks of it."""

import dataclasses

from pasa_jax.pallas_kernels import blocks


@dataclasses.dataclass(frozen=True)
class TokenGrid:
    """Video tokens of one sequence in raster order: frames outermost, columns innermost.

    Attributes:
        frames, rows, columns: F, Y, X, counted in tokens.
    """

    frames: int
    rows: int
    columns: int

    def __post_init__(self):
        for name in ("frames", "rows", "columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1 token")

    @property
    def num_tokens(self) -> int:
        """T = F · Y · X."""
        return self.frames * self.rows * self.columns

    def num_blocks(self, block: int) -> int:
        """Blocks of `block` tokens that cover the sequence; the last one may be ragged."""
        if block < 1:
            raise ValueError(f"{block=} must be at least 1 token")
        return blocks.num_blocks(self.num_tokens, block)

    @classmethod
    def for_video(
        cls,
        frames: int,
        height: int,
        width: int,
        *,
        strides: tuple[int, int, int] = (4, 8, 8),
        patch: tuple[int, int, int] = (1, 2, 2),
        first_frame_alone: bool = True,
    ) -> "TokenGrid":
        """The grid of a video, by default Wan's: 81 × 480 × 832 gives 21 × 30 × 52.

        Args:
            frames, height, width: of the video, in frames and pixels.
            strides: frames, rows and columns of the video in one cell of the latents.
            patch: frames, rows and columns of the latents in one token.
            first_frame_alone: the first frame has a latent frame of its own (Wan's causal VAE):
                frames = stride · (F − 1) + 1. False: frames = stride · F.

        Raises:
            ValueError: a size the grid cannot hold; the message has the nearest one it can.
        """
        lead = strides[0] - 1 if first_frame_alone else 0
        return cls(
            _tokens("frames", frames, strides[0] * patch[0], lead),
            _tokens("height", height, strides[1] * patch[1], 0),
            _tokens("width", width, strides[2] * patch[2], 0),
        )


def _tokens(name: str, size: int, unit: int, lead: int) -> int:
    """size = unit · tokens − lead, solved for tokens."""
    tokens, rest = divmod(size + lead, unit)
    if rest or tokens < 1:
        nearest = max(1, tokens + (2 * rest > unit)) * unit - lead
        rule = f"a positive multiple of {unit}" + (f", less {lead}" if lead else "")
        raise ValueError(f"{name}={size} must be {rule}; nearest is {nearest}")
    return tokens

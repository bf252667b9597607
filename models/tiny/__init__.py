"""tiny: a small Wan transformer with a word-level text table and a linear codec, shipped whole.

For the pipeline:
    WEIGHTS                          the shipped folder, laid out as a diffusers pipeline
    text.load(WEIGHTS / "text_encoder").encode(prompts)  → states [B, 16, D]; "" is no prompt
    codec.load(WEIGHTS / "vae").decode(latents)          → video [B, frames, H, W, 3] in 0..1
    WEIGHTS / "transformer"          the Wan transformer, read by the converter
Video of 4·F frames × 4·Y × 4·X pixels ↔ latents [B, F, Y, X, 16]; Y and X must be even (Wan's
patch). Prompts outside tiny's words raise a ValueError that names the nearest word.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"

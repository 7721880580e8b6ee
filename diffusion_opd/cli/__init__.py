"""The command `diffusion-opd`."""

"""From conditioning to latents, and from prompts to images."""

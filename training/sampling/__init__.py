"""From noise to latents and pictures: DDIM with guidance, its differentiable rollout, pictures of prompts."""

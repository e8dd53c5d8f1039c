"""What is minimised: the denoising loss, rewards through the sampler or on images, constraints."""

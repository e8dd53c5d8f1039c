"""Every chart, drawn from plain numbers. What the numbers mean is decided above."""

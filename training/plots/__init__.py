"""Every chart, drawn from plain numbers. Their meaning is defined in the folders above."""

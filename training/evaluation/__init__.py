"""What a loss does not tell: text gap, diversity guard, figures over sets of prompts."""

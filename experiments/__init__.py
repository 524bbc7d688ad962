"""What makes z useful: the trainings and evaluations behind docs/learning.md."""

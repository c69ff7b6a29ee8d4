"""The student: its parameters, trained, frozen or adapted, and what makes its steps fast or small."""

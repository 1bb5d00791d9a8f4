"""What a program needs so that guesses of its next tokens can be checked many at a time."""

"""What a rank costs before anything is trained: ``fastlora.plan``."""

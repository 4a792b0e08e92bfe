"""fastlora and its peers, measured side by side: README.md says what, how, and how to add to it."""

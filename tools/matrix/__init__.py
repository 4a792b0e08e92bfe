"""fastlora's wheel with many versions of its dependencies: see noxfile.py."""

"""fastlora's wheel under the versions that people have: see noxfile.py."""

"""fastlora's wheel under the versions that people have: see __main__.py."""

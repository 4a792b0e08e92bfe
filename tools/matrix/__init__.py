"""fastlora's wheel with many versions of its dependencies: see __main__.py."""

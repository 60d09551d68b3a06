"""A checker that knows only the public interface: real machines, drawn faults, judged answers."""

//! The command `pagoda`.
fn main() {}

//! The command `pagoda`.

fn main() -> std::process::ExitCode {
    pagoda_engine::cli::main()
}

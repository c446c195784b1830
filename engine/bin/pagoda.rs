//! The command `pagoda`.
use std::process::ExitCode;

fn main() -> ExitCode {
    // A certification runs the TPU compiler in a child process, which is this program again.
    if let Some(code) = pagoda_engine::certify::run_if_asked() {
        return code;
    }
    pagoda_engine::cli::main()
}

//! The command `pagoda`.
use std::process::ExitCode;

fn main() -> ExitCode {
    // A certification runs the TPU compiler in a child process, which is this program again.
    if let Some(code) = pagoda_engine::certify::run_if_asked() {
        return code;
    }
    // So does each check of a bring-up.
    if let Some(code) = pagoda_engine::bringup::run_if_asked() {
        return code;
    }
    // The plugins' own messages on stderr, unless they were asked for.
    if std::env::var_os("TF_CPP_MIN_LOG_LEVEL").is_none() {
        // SAFETY: this thread is the process's only one.
        unsafe { std::env::set_var("TF_CPP_MIN_LOG_LEVEL", "2") };
    }
    pagoda_engine::cli::main()
}

//! The command `pagoda`.
use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(code) = pagoda_engine::certify::run_if_asked() {
        return code;
    }
    ExitCode::SUCCESS
}

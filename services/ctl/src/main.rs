//! `slotmesh`: reads the command line, does what it says, exits with a code that scripts can read.

use std::process::ExitCode;

use clap::Parser;
use slotmesh_ctl::{command::Cli, render};

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    match Box::pin(cli.run()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let mut text = format!("slotmesh: {failure}");
            let mut cause = std::error::Error::source(&failure);
            while let Some(source) = cause {
                text.push_str(&format!(": {source}"));
                cause = source.source();
            }
            render::note(&text);
            if let Some(next) = failure.next_step() {
                render::note(&format!("  {next}"));
            }
            failure.exit_code()
        }
    }
}

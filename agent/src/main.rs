//! `slotmesh-agent`: flags, telemetry, bind, run, exit code.

use std::process::ExitCode;

use clap::Parser;
use slotmesh_agent::{
    app::App,
    handover::driver::chain,
    settings::{Flags, Settings},
};
use slotmesh_runtime::{settings::EXIT_USAGE, shutdown, telemetry};

#[tokio::main]
async fn main() -> ExitCode {
    let flags = Flags::parse();
    let _telemetry = telemetry::init("slotmesh-agent");
    let settings = match Settings::resolve(flags) {
        Ok(settings) => settings,
        Err(error) => {
            tracing::error!(error = %chain(&error), "settings can't be used");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    tracing::info!(?settings, "effective settings");
    match Box::pin(work(settings)).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = %chain(error.as_ref()), "agent ends with an error");
            ExitCode::FAILURE
        }
    }
}

async fn work(settings: Settings) -> anyhow::Result<()> {
    // Before anything starts, so that an early signal is seen.
    let signalled = tokio::spawn(shutdown::signalled());
    let app = App::bind(settings).await?;
    app.run(async {
        match signalled.await {
            Ok(Ok(())) => {}
            failed => tracing::error!(?failed, "signals can't be received; ending"),
        }
    })
    .await?;
    Ok(())
}

//! `slotmesh-agent`: flags, telemetry, bind, run, exit code.

use std::{io::Write, path::Path, process::ExitCode};

use clap::Parser;
use slotmesh_agent::{
    app::App,
    fencer,
    handover::driver::chain,
    settings::{Command, Flags, Settings},
};
use slotmesh_runtime::{settings::EXIT_USAGE, shutdown, telemetry};

fn main() -> ExitCode {
    let flags = Flags::parse();
    let mut builder = match flags.command.is_some() {
        // Locked in memory and idle: one thread is enough.
        true => tokio::runtime::Builder::new_current_thread(),
        false => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = match builder.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "start threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(async {
        match flags.command {
            Some(Command::Fencer { data }) => guard(&data).await,
            None => agent(flags).await,
        }
    })
}

async fn guard(data: &Path) -> ExitCode {
    let _telemetry = telemetry::init("slotmesh-fencer");
    match fencer::run(data).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = %chain(&error), "fencer ends with an error");
            ExitCode::FAILURE
        }
    }
}

async fn agent(flags: Flags) -> ExitCode {
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

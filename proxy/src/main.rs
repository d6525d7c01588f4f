//! `slotmesh-proxy`: flags, telemetry, bind, run.

use std::process::ExitCode;

use clap::Parser as _;
use slotmesh_proxy::app::App;
use slotmesh_proxy::settings::{Flags, Settings};
use slotmesh_runtime::settings::EXIT_USAGE;
use slotmesh_runtime::{shutdown, telemetry};
use tokio_util::sync::CancellationToken;

fn main() -> ExitCode {
    // Control work only: the data plane has threads of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("control")
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(run()),
        Err(error) => {
            eprintln!("slotmesh-proxy: start the runtime: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> ExitCode {
    let flags = Flags::parse();
    let _telemetry = telemetry::init("slotmesh-proxy");
    let settings = match Settings::load(flags) {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("slotmesh-proxy: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    tracing::info!(?settings, "settings in force");
    let stop = CancellationToken::new();
    let signalled = stop.clone();
    tokio::spawn(async move {
        if let Err(error) = shutdown::signalled().await {
            tracing::error!(%error, "signals cannot be received");
        }
        signalled.cancel();
    });
    match App::bind(settings).await {
        Ok(app) => match app.run(stop).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(error.exit_status(), error.into()),
        },
        Err(error) => fail(error.exit_status(), error.into()),
    }
}

fn fail(status: u8, error: anyhow::Error) -> ExitCode {
    eprintln!("slotmesh-proxy: {error:#}");
    ExitCode::from(status)
}

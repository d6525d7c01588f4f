//! The process itself: exit codes, signals, kill -9.

use std::{path::Path, process::Stdio};

use rustix::process::Signal;
use slotmesh_agent::process::Process;
use tokio::{
    process::{Child, Command},
    time::timeout,
};

use crate::{
    controller::{Controller, WAIT, is_running},
    hosts::{eventually, kill},
};

fn agent(controller: &Controller, data: &Path, extra: &[&str]) -> Child {
    spawn(controller, "h-a", data, extra)
}

/// The process of a host's agent.
pub(crate) fn agent_of(controller: &Controller, host: &str, data: &Path) -> Child {
    spawn(controller, host, data, &[])
}

fn spawn(controller: &Controller, host: &str, data: &Path, extra: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_slotmesh-agent"))
        .args(["--host-id", host, "--data"])
        .arg(data)
        .args(["--controller", &controller.address.to_string()])
        .args(extra)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

pub(crate) async fn end(child: &mut Child, signal: Signal) -> std::process::ExitStatus {
    kill(child.id().unwrap(), signal);
    timeout(WAIT, child.wait())
        .await
        .expect("agent to end")
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_leaves_its_node_serving_and_its_successor_adopts_it() {
    let controller = Controller::start().await;
    let dir = tempfile::tempdir().unwrap();
    let mut first = agent(&controller, dir.path(), &[]);
    let node = controller.until("running", 0, is_running).await;
    end(&mut first, Signal::KILL).await;
    assert!(Process::find(node.pid).is_some());

    let mut second = agent(&controller, dir.path(), &[]);
    let pid = second.id().unwrap();
    eventually("the second agent to register", async || {
        controller.register("h-a").is_some_and(|r| r.pid == pid)
    })
    .await;
    controller.change(|record| record.parameters = [("maxmemory".into(), "99mb".into())].into());
    let adopted = controller
        .until("control", 0, |n| n.max_memory == 99 << 20)
        .await;
    assert_eq!((adopted.pid, adopted.run_id), (node.pid, node.run_id));
    let status = end(&mut second, Signal::TERM).await;
    assert!(status.success(), "{status}");
    assert!(Process::find(node.pid).is_some());

    let mut third = agent(&controller, dir.path(), &["--stop-all-on-exit"]);
    let pid = third.id().unwrap();
    eventually("the third agent to register", async || {
        controller.register("h-a").is_some_and(|r| r.pid == pid)
    })
    .await;
    let status = end(&mut third, Signal::INT).await;
    assert!(status.success(), "{status}");
    assert_eq!(Process::find(node.pid), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_usage_exits_64_and_a_port_in_use_exits_1_with_the_flag_that_changes_it() {
    let controller = Controller::start().await;
    let dir = tempfile::tempdir().unwrap();
    let output = async |extra: &[&str]| {
        let child = agent(&controller, dir.path(), extra);
        let output = timeout(WAIT, child.wait_with_output())
            .await
            .expect("agent to end")
            .unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let (code, text) = output(&["--engine", "nonsense"]).await;
    assert!(
        code == Some(64) && text.contains("--engine"),
        "{code:?} {text}"
    );
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().map(|a| (taken, a)).unwrap();
    let (code, text) = output(&["--listen", &taken.1.to_string()]).await;
    assert!(
        code == Some(1) && text.contains("--listen"),
        "{code:?} {text}"
    );
}

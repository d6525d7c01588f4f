//! A data directory is taken up again, or refused in words that help.

use super::*;

fn settings(dir: &Path) -> Settings {
    Settings {
        data: dir.to_owned(),
        ..Settings::default()
    }
}

#[test]
fn a_second_start_finds_the_same_ports_and_shape() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = settings(dir.path());
    first.shards = Some(3);
    let made = Layout::open(&first).unwrap().file;
    let found = Layout::open(&settings(dir.path())).unwrap().file;
    assert_eq!(made, found);
    assert_eq!(found.agents.len(), 3);
}

#[test]
fn there_are_enough_hosts_for_every_node_of_a_shard() {
    let dir = tempfile::tempdir().unwrap();
    let mut many = settings(dir.path());
    many.replicas = Some(4);
    assert_eq!(Layout::open(&many).unwrap().file.agents.len(), 5);
}

fn refusal(settings: &Settings) -> String {
    match Layout::open(settings) {
        Err(failure @ Failure::RefusedHere(_)) => failure.to_string(),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[test]
fn another_shape_is_refused_and_named() {
    let dir = tempfile::tempdir().unwrap();
    drop(Layout::open(&settings(dir.path())).unwrap());
    let mut other = settings(dir.path());
    other.shards = Some(5);
    other.engine = Some("7.0".into());
    other.parameters.insert("hz".into(), "9".into());
    let text = refusal(&other);
    assert!(text.contains("--shards 5 (it has 2)"), "{text}");
    assert!(
        text.contains("--engine 7.0 (it has redis-server on PATH)"),
        "{text}"
    );
    assert!(text.contains("--parameter hz=9 (it has none)"), "{text}");
}

#[test]
fn a_directory_in_use_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _first = Layout::open(&settings(dir.path())).unwrap();
    assert!(refusal(&settings(dir.path())).contains("another `slotmesh up`"));
}

#[test]
fn a_directory_of_a_newer_version_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let newer = r#"{"schema":2,"something":"else"}"#;
    fs::write(dir.path().join("mesh.json"), newer).unwrap();
    let text = refusal(&settings(dir.path()));
    assert!(text.contains("format 2, this one knows up to 1"), "{text}");
    assert_eq!(
        fs::read_to_string(dir.path().join("mesh.json")).unwrap(),
        newer
    );
}

#[test]
fn a_directory_with_other_files_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("thesis.txt"), "precious").unwrap();
    assert!(refusal(&settings(dir.path())).contains("thesis.txt"));
}

#[test]
fn a_port_in_use_is_named_with_its_owner() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::open(&settings(dir.path())).unwrap();
    let port = layout.file.agents[1].port;
    let _taken = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    let text = layout
        .require_free_ports()
        .expect_err("port is taken")
        .to_string();
    assert!(
        text.contains(&format!("127.0.0.1:{port} of the agent of host-2")),
        "{text}"
    );
}

#[test]
fn a_standard_instance_has_one_shard() {
    let dir = tempfile::tempdir().unwrap();
    let mut standard = settings(dir.path());
    standard.architecture = Some("standard".into());
    standard.shards = Some(2);
    assert!(matches!(Layout::open(&standard), Err(Failure::Usage(_))));
    standard.shards = None;
    assert_eq!(Layout::open(&standard).unwrap().file.shape.shards, 1);
}

//! What every .proto file keeps to: a reader finds a message by its name, a caller by its RPC.

use crate::{TextFile, assert_none, texts_with};

fn protos() -> Vec<TextFile> {
    let files = texts_with("proto");
    assert!(!files.is_empty(), "the contract is in proto/");
    files
}

#[test]
fn a_package_is_its_path() {
    let mut complaints = Vec::new();
    for file in protos() {
        let parts: Vec<&str> = file.path.split('/').collect();
        let ["proto", "slotmesh", noun, version, name] = parts[..] else {
            complaints.push(format!("{}: is not proto/slotmesh/<noun>/v<n>/", file.path));
            continue;
        };
        if name != format!("{noun}.proto") {
            complaints.push(format!("{}: is not named {noun}.proto", file.path));
        }
        let package = format!("package slotmesh.{noun}.{version};");
        if !file.text.lines().any(|line| line.trim() == package) {
            complaints.push(format!("{}: does not say `{package}`", file.path));
        }
    }
    assert_none("packages follow paths", &complaints);
}

#[test]
fn every_rpc_has_a_request_and_a_response_of_its_own() {
    let mut complaints = Vec::new();
    let mut count = 0;
    for file in protos() {
        for statement in rpcs(&file.text) {
            count += 1;
            match parse(&statement) {
                Some((rpc, request, response)) => {
                    let expected = (format!("{rpc}Request"), format!("{rpc}Response"));
                    if (request, response) != (&expected.0, &expected.1) {
                        complaints.push(format!("{}: {statement}", file.path));
                    }
                }
                None => complaints.push(format!("{}: can't read: {statement}", file.path)),
            }
        }
    }
    assert!(count > 0, "there are RPCs to check");
    assert_none("<Rpc>Request and <Rpc>Response", &complaints);
}

/// Each `rpc …` up to its `;` or `{`, on one line.
fn rpcs(text: &str) -> Vec<String> {
    let code: Vec<&str> = text
        .lines()
        .map(|l| l.split("//").next().unwrap_or(""))
        .collect();
    let code = code.join(" ");
    let statements = code.split([';', '{', '}']).map(str::trim);
    let rpcs = statements.filter(|statement| statement.starts_with("rpc "));
    rpcs.map(|s| s.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

/// `rpc Name(stream? Request) returns (stream? Response)`
fn parse(statement: &str) -> Option<(&str, &str, &str)> {
    let (name, rest) = statement.strip_prefix("rpc ")?.split_once('(')?;
    let (request, rest) = rest.split_once(')')?;
    let response = rest.trim().strip_prefix("returns")?.trim();
    let response = response.strip_prefix('(')?.strip_suffix(')')?;
    Some((name.trim(), message(request), message(response)))
}

fn message(parameter: &str) -> &str {
    let parameter = parameter.trim();
    parameter
        .strip_prefix("stream ")
        .unwrap_or(parameter)
        .trim()
}

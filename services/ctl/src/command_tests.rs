//! The command line is a contract with scripts: what parses, and what does not.

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

#[test]
fn the_contract_of_the_command_line_parses() {
    for line in [
        "slotmesh up --data d",
        "slotmesh up --data d --architecture standard --shards 1 --replicas 0 --proxies 1 --workers 2 --engine 7.0 --store etcd://h:1,h:2 --output json",
        "slotmesh up --data d --store etcd://h:1 --controllers 3 --etcd-user u --etcd-password-file p --etcd-ca c --etcd-cert t --etcd-key k",
        "slotmesh --controller h:1 --output json instance create --architecture cluster --shards 3 --wait",
        "slotmesh --controller h:1 instance list",
        "slotmesh instance describe r-1 --controller h:1",
        "slotmesh instance delete r-1 --wait --client-token t",
        "slotmesh switchover r-1 --target n-1 --target n-2 --client-token t --wait",
        "slotmesh up --data d --parameter enable-debug-command=yes --parameter save=",
        "slotmesh account set r-1 web on >secret ~* -@all +get",
        "slotmesh account set --password-file f r-1 web",
        "slotmesh account list r-1",
        "slotmesh account remove r-1 web other",
        "slotmesh parameters set r-1 --engine save= --engine hz=20 --proxy split=slot",
        "slotmesh parameters show r-1",
        "slotmesh switchover r-1 --target n-1 --at 2026-11-22T03:00:00Z",
        "slotmesh switchover r-1 --target n-1 --in-window",
        "slotmesh failover r-1 --shard 0 --accept-data-loss --wait",
        "slotmesh epochs r-1 --shard 0",
        "slotmesh lost-writes list",
        "slotmesh lost-writes list r-1",
        "slotmesh lost-writes show r-1 f.resp --only user:* --command SET --output json",
        "slotmesh lost-writes replay r-1 f.resp --only user:* --command SET --command DEL --from 7 --password-file p --yes",
        "slotmesh instance maintain r-1 --window 02:00-03:30",
        "slotmesh task list --kind SwitchOver --state needs-operator --shard 0 --since 2026-11-22T03:00:00Z",
        "slotmesh task reschedule t-1 --in-window",
        "slotmesh task resolve t-1 accept-loss --client-token t",
        "slotmesh task list --instance r-1",
        "slotmesh task show t-1 --steps -v",
        "slotmesh status --controller h:1,h:2 -o json",
        "slotmesh task watch t-1 --from 4",
        "slotmesh task cancel t-1",
        "slotmesh node replace r-1 r-1-0-1 --to host-3 --wait --client-token t",
        "slotmesh node priority r-1 r-1-0-1 0",
        "slotmesh instance replace-after r-1 60",
        "slotmesh host list",
        "slotmesh proxy list --instance r-1",
        "slotmesh proxy upgrade r-1 --to 0.2.0 --proxy p-1 --proxy p-0 --at window --bake 5 --wait",
        "slotmesh proxy upgrade r-1 --plan --at 2026-11-22T03:00:00Z --client-token t",
        "slotmesh proxy restart r-1 --proxy p-1 --wait",
        "slotmesh demo",
    ] {
        parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    }
}

#[test]
fn what_cannot_be_meant_is_a_usage_error() {
    for line in [
        "slotmesh",
        "slotmesh up",
        "slotmesh up --data d --shards 0",
        "slotmesh up --data d --replicas 6",
        "slotmesh up --data d --output yaml",
        "slotmesh up --data d --controllers 6",
        "slotmesh up --data d --store etcd://h:1 --etcd-user u",
        "slotmesh switchover r-1",
        "slotmesh switchover r-1 --target n --at 2026-11-22T03:00:00Z --in-window",
        "slotmesh failover r-1 --shard 0",
        "slotmesh task list --state asleep",
        "slotmesh instance create --parameter novalue",
        "slotmesh parameters set r-1",
        "slotmesh parameters set r-1 --engine novalue",
        "slotmesh account remove r-1",
        "slotmesh proxy restart r-1",
    ] {
        let error = parse(line).expect_err(line);
        assert_eq!(error.exit_code(), 2, "{line}");
    }
}

#[test]
fn help_documents_the_exit_codes() {
    use clap::CommandFactory;
    let help = Cli::command().render_help().to_string();
    assert!(help.contains("3  refused"), "{help}");
}

//! While an instance is upgraded its clients do not notice which engine serves them: what only the new
//! one knows is unknown on every shard until all run it, and no client can close the way back by it.

#![allow(clippy::unwrap_used)]

use slotmesh_e2e::{
    client,
    upgrades::{LIMIT, begin, fill, is_done, list, mesh_of, say, until},
};
use slotmesh_harness::{Mesh, wait_until};
use slotmesh_proto::{
    instance::v1::{FinalizeBy, ModifyInstanceMinorVersionRequest},
    task::v1::Task,
};

/// They are on different shards of two.
const KEYS: [&str; 2] = ["{a}", "{b}"];

/// What every proxy answers to a command of 7.4, of a key on each shard.
async fn answers(mesh: &Mesh) -> anyhow::Result<Vec<Result<Vec<i64>, String>>> {
    let mut all = Vec::new();
    for proxy in 0..mesh.contract.proxies.len() {
        let mut connection = client(mesh, proxy).await?;
        for key in KEYS {
            let mut expire = redis::cmd("HPEXPIRE");
            expire.arg(key).arg(9_000_000).arg(&["FIELDS", "1", "f"]);
            let answer: redis::RedisResult<Vec<i64>> = expire.query_async(&mut connection).await;
            all.push(answer.map_err(|error| error.to_string()));
        }
    }
    Ok(all)
}

#[tokio::test]
async fn a_command_of_the_new_engine_is_unknown_on_every_shard_until_all_run_it() {
    let (mesh, _) = mesh_of("cluster", 2, "redis-7.0").await.unwrap();
    let name = list(&mesh, "redis", "8.2.3", "redis-8.2").await.unwrap();
    fill(&mesh).await.unwrap();
    let mut connection = client(&mesh, 0).await.unwrap();
    for key in KEYS {
        let mut set = redis::cmd("HSET");
        set.arg(key).arg("f").arg("v");
        set.query_async::<()>(&mut connection).await.unwrap();
    }
    let before = answers(&mesh).await.unwrap();
    for answer in &before {
        let refused = answer.as_ref().unwrap_err();
        assert!(refused.contains("unknown command 'HPEXPIRE'"), "{refused}");
    }
    let options = ModifyInstanceMinorVersionRequest {
        finalize: FinalizeBy::Operator.into(),
        ..ModifyInstanceMinorVersionRequest::default()
    };
    let task = begin(&mesh, &name, options).await.unwrap();
    for shard in 0..KEYS.len() {
        let bakes =
            |t: &Task| t.shards[shard].phase == "Bake" && t.shards[shard].rollback == "Open";
        let what = format!("shard {shard} to bake, with the way back open");
        until(&mesh, &task, &what, bakes).await.unwrap();
        assert_eq!(answers(&mesh).await.unwrap(), before, "{what}");
        // It would have been closed by what one of them wrote.
        let now = mesh.api().await.unwrap().task(&task).await.unwrap();
        assert_eq!(now.shards[shard].rollback, "Open", "{now:#?}");
        say(&mesh, &["resolve", &task, "finalize"]).await.unwrap();
    }
    until(&mesh, &task, "the upgrade to be done", is_done)
        .await
        .unwrap();
    wait_until(
        LIMIT,
        "what the new engine knows to be let through",
        async || {
            let answers = answers(&mesh).await?;
            let passes = |answer: &Result<Vec<i64>, String>| *answer == Ok(vec![1]);
            anyhow::ensure!(answers.iter().all(passes), "{answers:?}");
            anyhow::Ok(())
        },
    )
    .await
    .unwrap();
    mesh.stop().await.unwrap();
}

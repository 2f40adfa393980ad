//! What a condition is judged against: the key's newest version, wherever it lies.

use anyhow::{Result, ensure};
use reqwest::{Method, StatusCode};

use crate::{
    dead_letters::REFUSE,
    world::{Answer, Api, World, breakable, eventually},
};

/// `If-None-Match: *`.
pub const ABSENT: &[(&str, &str)] = &[("if-none-match", "*")];
/// `If-Match: *`.
const PRESENT: &[(&str, &str)] = &[("if-match", "*")];

/// The tag of a version.
pub fn tag(version: u64) -> String {
    format!("\"{version}\"")
}

pub async fn trimmed(world: &World<'_>) -> Result<()> {
    eventually("the log is trimmed", async || {
        Ok((world.log_depth().await?.0 == 0).then_some(()))
    })
    .await
}

impl Answer {
    /// 412 as docs/API.md has it, with the ETag of `current` or none.
    pub fn mismatch(&self, current: Option<u64>) -> Result<()> {
        let expected = current.map(tag).unwrap_or_default();
        ensure!(self.status == StatusCode::PRECONDITION_FAILED, "{self:?}");
        ensure!(self.header("etag") == expected, "{expected}: {self:?}");
        Ok(())
    }
}

/// Of a key that has `version`, every condition is judged rightly; returns the version it has in the end.
async fn judged_as_present(api: &Api, key: &str, version: u64) -> Result<u64> {
    let (right, wrong) = (tag(version), tag(version - 1));
    let refused: &[&[(&str, &str)]] = &[
        ABSENT,
        &[("if-match", &wrong)],
        &[("if-match", "\"abc\"")],
        &[("if-none-match", &right)],
        &[("if-match", &right), ("if-none-match", "*")],
    ];
    for headers in refused {
        let answer = api.post_if(key, headers, "\"refused\"").await?;
        answer.mismatch(Some(version))?;
        assert_eq!(answer.json()?["code"], "VERSION_MISMATCH");
        api.ask(Method::DELETE, key, headers)
            .await?
            .mismatch(Some(version))?;
    }
    let either = format!("{wrong}, {right}");
    let mut version = api
        .post_if(key, &[("if-match", &either)], "1")
        .await?
        .expect(StatusCode::CREATED)?
        .version()?;
    let latest = tag(version);
    let both = [("if-match", latest.as_str()), ("if-none-match", &right)];
    for headers in [both.as_slice(), PRESENT] {
        let answer = api.post_if(key, headers, "2").await?;
        let newer = answer.expect(StatusCode::CREATED)?.version()?;
        assert!(newer > version);
        version = newer;
    }
    Ok(version)
}

/// Of a key that has no value, every condition is judged rightly; returns the version it has in the end.
async fn judged_as_absent(api: &Api, key: &str, some: u64) -> Result<u64> {
    let some = tag(some);
    for headers in [
        PRESENT,
        &[("if-match", some.as_str())],
        &[("if-match", "*"), ("if-none-match", "*")],
    ] {
        api.post_if(key, headers, "\"refused\"")
            .await?
            .mismatch(None)?;
        api.ask(Method::DELETE, key, headers)
            .await?
            .mismatch(None)?;
    }
    api.ask(Method::DELETE, key, ABSENT)
        .await?
        .expect(StatusCode::NOT_FOUND)?;
    api.get(key).await?.expect(StatusCode::NOT_FOUND)?;
    let created = api.post_if(key, ABSENT, "1").await?;
    created.expect(StatusCode::CREATED)?.version()
}

#[tokio::test]
async fn a_condition_is_judged_against_what_is_in_the_log() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let version = judged_as_absent(&api, "never", 7).await?;
    judged_as_present(&api, "never", version).await?;
    let version = api.write("deleted", "1").await?;
    api.delete("deleted")
        .await?
        .expect(StatusCode::NO_CONTENT)?;
    let version = judged_as_absent(&api, "deleted", version).await?;
    judged_as_present(&api, "deleted", version).await?;
    Ok(())
}

#[tokio::test]
async fn a_put_is_judged_as_a_post_is() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let put = async |header: &str, tag: &str, value: &str| {
        api.write_if(Method::PUT, "k", &[(header, tag)], value)
            .await
    };
    put("if-match", "*", "0")
        .await?
        .expect(StatusCode::PRECONDITION_FAILED)?;
    let first = put("if-none-match", "*", "1").await?;
    let first = first.expect(StatusCode::OK)?.version()?;
    put("if-none-match", "*", "2")
        .await?
        .expect(StatusCode::PRECONDITION_FAILED)?;
    let tag = format!("\"{first}\"");
    let second = put("if-match", &tag, "2").await?;
    let second = second.expect(StatusCode::OK)?.version()?;
    let late = put("if-match", &tag, "3").await?;
    assert_eq!(late.status, StatusCode::PRECONDITION_FAILED);
    assert_eq!(late.version()?, second);
    assert_eq!(api.read("k").await?.as_deref(), Some("2"));
    Ok(())
}

#[tokio::test]
async fn a_condition_is_judged_against_what_is_in_postgresql() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let _worker = world.eager_worker().await?;
    let version = api.write("kept", "1").await?;
    let deleted = api.write("deleted", "1").await?;
    api.delete("deleted")
        .await?
        .expect(StatusCode::NO_CONTENT)?;
    trimmed(&world).await?;
    judged_as_present(&api, "kept", version).await?;
    judged_as_absent(&api, "deleted", deleted).await?;
    judged_as_absent(&api, "never", deleted).await?;
    Ok(())
}

#[tokio::test]
async fn a_delete_happens_only_to_the_version_that_was_meant() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let older = api.write("k", "1").await?;
    let newer = api.write("k", "2").await?;
    let delete = async |version: u64| {
        let headers = [("if-match", &*tag(version))];
        api.ask(Method::DELETE, "k", &headers).await
    };
    delete(older).await?.mismatch(Some(newer))?;
    assert_eq!(api.read("k").await?.as_deref(), Some("2"));
    delete(newer).await?.expect(StatusCode::NO_CONTENT)?;
    assert_eq!(api.read("k").await?, None);
    delete(newer).await?.mismatch(None)?;
    // The same once the value is in PostgreSQL alone.
    let newest = api.write("k", "3").await?;
    let _worker = world.eager_worker().await?;
    trimmed(&world).await?;
    delete(newer).await?.mismatch(Some(newest))?;
    delete(newest).await?.expect(StatusCode::NO_CONTENT)?;
    delete(newest).await?.mismatch(None)?;
    assert_eq!(api.read("k").await?, None);
    Ok(())
}

#[tokio::test]
async fn a_touch_happens_only_to_the_version_that_was_meant() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let older = api.write("k", "1").await?;
    let newer = api.write("k", "2").await?;
    let touch = async |version: u64| {
        let (headers, body) = ([("if-match", &*tag(version))], r#"{"ttl":600}"#.to_owned());
        api.send_with(Method::PATCH, "/v1/cache/k", &headers, Some(body))
            .await
    };
    // None has a time to live before it is touched.
    let check = async |version: u64, has_ttl: bool| {
        let read = api.get("k").await?.expect(StatusCode::OK)?;
        let json = read.json()?;
        assert_eq!((read.version()?, &json["value"]), (version, &2.into()));
        assert_eq!(json["ttl"].is_number(), has_ttl, "{json}");
        anyhow::Ok(())
    };
    touch(older).await?.mismatch(Some(newer))?;
    check(newer, false).await?;
    let touched = touch(newer).await?.expect(StatusCode::OK)?.version()?;
    assert!(touched > newer);
    check(touched, true).await?;
    touch(newer).await?.mismatch(Some(touched))?;
    // The same once the value is in PostgreSQL alone.
    let _worker = world.eager_worker().await?;
    trimmed(&world).await?;
    touch(newer).await?.mismatch(Some(touched))?;
    let again = touch(touched).await?.expect(StatusCode::OK)?.version()?;
    assert!(again > touched);
    check(again, true).await?;
    Ok(())
}

#[tokio::test]
async fn an_expired_entry_meets_no_condition_but_absence() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let mut versions = Vec::new();
    for key in ["pending", "stored"] {
        let answer = api.post(key, r#"{"value":1,"ttl":1}"#).await?;
        versions.push(answer.expect(StatusCode::CREATED)?.version()?);
    }
    for key in ["pending", "stored"] {
        eventually("it expires", async || {
            Ok((api.get(key).await?.status == StatusCode::NOT_FOUND).then_some(()))
        })
        .await?;
    }
    judged_as_absent(&api, "pending", versions[0]).await?;
    let _worker = world.eager_worker().await?;
    trimmed(&world).await?;
    judged_as_absent(&api, "stored", versions[1]).await?;
    Ok(())
}

#[tokio::test]
async fn a_write_that_postgresql_refused_is_what_its_key_is_judged_by() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let worker = world.eager_worker().await?;
    let stored = api.write("poison", "1").await?;
    world.stored("poison", stored).await?;
    world.sql(REFUSE).await?;
    let refused = api.write("poison", "2").await?;
    eventually("it is a dead letter", async || {
        let dead = world.sql("select version from dead_keys").await?;
        Ok((dead.trim() == refused.to_string()).then_some(()))
    })
    .await?;
    trimmed(&world).await?;
    drop(worker);
    let headers = [("if-match", &*tag(stored))];
    api.post_if("poison", &headers, "3")
        .await?
        .mismatch(Some(refused))?;
    judged_as_present(&api, "poison", refused).await?;
    Ok(())
}

#[tokio::test]
async fn without_postgresql_a_condition_is_judged_by_the_log_or_not_at_all() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let pending = api.write("pending", "1").await?;
    stack.postgres.kill().await?;
    judged_as_present(&api, "pending", pending).await?;
    for _ in 0..2 {
        api.post_if("never", ABSENT, "1")
            .await?
            .refused("UNAVAILABLE")?;
        api.ask(Method::DELETE, "never", PRESENT)
            .await?
            .refused("UNAVAILABLE")?;
    }
    // Certainly not written.
    stack.postgres.start().await?;
    eventually("PostgreSQL is back", async || {
        let answer = api.get("never").await?;
        Ok((answer.status == StatusCode::NOT_FOUND).then_some(()))
    })
    .await?;
    stack.nats.kill().await?;
    api.post_if("pending", PRESENT, "1")
        .await?
        .refused("UNAVAILABLE")?;
    Ok(())
}

#[tokio::test]
async fn a_reader_that_has_the_version_gets_no_body() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let version = api.write("k", "1").await?;
    let (same, weak) = (tag(version), format!("\"1\", W/{}", tag(version)));
    for known in [same.as_str(), &weak, "*"] {
        for method in [Method::GET, Method::HEAD] {
            for cache_control in ["max-age=0", "no-cache"] {
                let headers = [("if-none-match", known), ("cache-control", cache_control)];
                let answer = api.ask(method.clone(), "k", &headers).await?;
                let answer = answer.expect(StatusCode::NOT_MODIFIED)?;
                assert_eq!(answer.header("etag"), same);
                assert_eq!(answer.header("cache-control"), "no-cache");
                assert_eq!(answer.body, "");
            }
        }
    }
    let known = [("if-none-match", same.as_str())];
    let newer = api.write("k", "2").await?;
    let answer = api.ask(Method::GET, "k", &known).await?;
    assert_eq!(answer.expect(StatusCode::OK)?.version()?, newer);
    api.ask(Method::GET, "nobody", &[("if-none-match", "*")])
        .await?
        .expect(StatusCode::NOT_FOUND)?;
    Ok(())
}

/// Whoever is told of a newer version finds it: a loop of read and conditional write ends, also while nobody stores.
#[tokio::test]
async fn after_a_failed_condition_redis_has_nothing_older() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let first = api.write("k", "1").await?;
    let older: Vec<u8> = redis::cmd("GET")
        .arg("birb:e:k")
        .query_async(&mut world.redis().await?)
        .await?;
    let second = api.write("k", "2").await?;
    // As if the API had been killed between the acknowledgement and telling Redis.
    redis::cmd("SET")
        .arg("birb:e:k")
        .arg(older)
        .exec_async(&mut world.redis().await?)
        .await?;
    assert_eq!(api.get("k").await?.version()?, first);
    let condition = format!("\"{first}\"");
    let refused = api
        .post_if("k", &[("if-match", &condition)], "3")
        .await?
        .expect(StatusCode::PRECONDITION_FAILED)?;
    assert_eq!(refused.version()?, second);
    assert_eq!(api.get("k").await?.version()?, second);
    Ok(())
}

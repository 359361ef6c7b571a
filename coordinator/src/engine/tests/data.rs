//! Data in a store: listed once, kept with the job, told to every gang of it.

use everlit_api::data::{DataTurn, Listed, ListedShard};
use expect_test::expect;

use super::*;

fn stored(world_size: u32) -> JobSpec {
    let mut spec = command(world_size);
    spec.data.shards = vec!["s3://runs/text/".into()];
    spec.secrets = [("AWS_SECRET_ACCESS_KEY".to_string(), "hidden".to_string())].into();
    spec
}

fn shards(names: &[&str]) -> Vec<ListedShard> {
    names.iter().map(|name| ListedShard { source: 0, name: (*name).into(), bytes: 100, etag: Some("e".into()) }).collect()
}

fn listed(name: &str, attempt: u32, names: &[&str]) -> Event {
    Event::DataListed { node: node(name), listed: Listed { job: job(1), attempt, shards: shards(names) } }
}

/// What a gang that begins now would be told.
fn told(scene: &Scene) -> Option<Vec<String>> {
    let data = scene.engine.job(job(1)).expect("active").gang_data().expect("its data is in a store");
    Some(data.shards?.into_iter().map(|shard| shard.name).collect())
}

#[test]
fn what_was_listed_first_is_kept_and_told_to_every_gang() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, stored(2));
    assert!(scene.take().contains("n1 <- start job 1"), "it is listed by who is to run it");
    assert_eq!(told(&scene), None);
    scene.at(100, listed("n1", 1, &["a", "b"]));
    scene.expect(expect![[r#"
        100 job 1: data_listed: the job's data is 2 shards with 200 bytes: what was listed is what is read from now on
        100   n1 <- start job 1 attempt 1 ranks 0+2 port 29500
    "#]]);
    assert!(scene.rows[&job(1)].listing.as_ref().is_some_and(|text| text.contains("\"name\":\"b\"")), "it is durable before it is told");
    // The bucket has another shard now, and somebody lists it again: nothing changes.
    scene.at(200, listed("n1", 1, &["a", "b", "c"]));
    scene.expect(expect![[r#"
        200   n1 <- start job 1 attempt 1 ranks 0+2 port 29500
    "#]]);
    assert_eq!(told(&scene), Some(vec!["a".into(), "b".into()]));
    scene.start_all(300, 1, 1, 2).exits(400, rank(1, 1, 0), killed(400)).exits(400, rank(1, 1, 1), killed(400));
    scene.restart_coordinator(500);
    assert_eq!(told(&scene), Some(vec!["a".into(), "b".into()]), "a coordinator after this one knows it, too");
    scene.take();
}

#[test]
fn a_listing_of_an_attempt_that_is_over_or_of_another_job_counts_for_nothing() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, stored(1)).take();
    scene.at(100, listed("n1", 2, &["a"])).expect(expect![""]);
    scene.at(150, Event::StopRequested { job: job(1), force: false, delete: false }).take();
    scene.at(200, listed("n1", 1, &["a"])).expect(expect![""]);
    let mut scene = Scene::with_node();
    scene.submit(0, 1, command(1)).take();
    scene.at(100, listed("n1", 1, &["a"])).expect(expect![""]);
}

#[test]
fn an_agent_that_is_linked_anew_hears_again_what_opens_the_store() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, stored(1)).at(50, listed("n1", 1, &["a"])).start_all(100, 1, 1, 1).take();
    scene.at(1_000, hello("n1", vec![alive(rank(1, 1, 0), 100)]));
    let text = scene.take();
    assert_eq!(text.matches("n1 <- start job 1").count(), 1, "{text}");
    assert!(!text.contains("hidden"), "{text}");
    // One that is told anyway is told once.
    let mut scene = Scene::with_node();
    scene.submit(0, 1, stored(1)).take();
    scene.at(1_000, hello("n1", vec![]));
    assert_eq!(scene.take().matches("n1 <- start job 1").count(), 1);
}

#[test]
fn where_shards_are_read_is_told() {
    let mut scene = Scene::with_node();
    scene.submit(0, 1, stored(1)).at(50, listed("n1", 1, &["a"])).start_all(100, 1, 1, 1).take();
    for (ms, local) in [(200, true), (300, false)] {
        let news = DataTurn { job: job(1), local, reason: "so".into() };
        scene.at(ms, Event::DataTurned { node: node("n1"), news });
    }
    scene.expect(expect![[r#"
        200 job 1: data_from_copy: n1 reads its shards from the local copy: so
        300 job 1: data_from_store: n1 reads its shards from the store again: so
    "#]]);
}

#[test]
fn the_step_of_preprocessing_is_what_all_ranks_have_stored() {
    let mut scene = Scene::with_node();
    let mut spec = stored(2);
    spec.kind = everlit_api::job::JobKind::Preprocess;
    spec.data.to = Some("s3://runs/made".parse().expect("a place"));
    scene.submit(0, 1, spec).at(50, listed("n1", 1, &["a", "b", "c", "d", "e"]));
    let data = scene.engine.job(job(1)).and_then(|job| job.gang_data()).expect("its data is in a store");
    assert_eq!(data.to.map(|to| to.to_string()), Some(format!("s3://runs/made/{}", job(1))), "each job has a folder of its own");
    scene.start_all(100, 1, 1, 2);
    let told = |scene: &Scene| {
        let progress = &scene.engine.job(job(1)).expect("active").progress;
        (progress.step, progress.total_steps)
    };
    let stored = |rank_of: u32, step| Beat { heartbeat: false, total_steps: Some(3), ..beat(rank(1, 1, rank_of), step) };
    scene.at(200, Event::RanksBeat(vec![stored(1, 2)]));
    assert_eq!(told(&scene), (Some(2), Some(5)));
    scene.at(300, Event::RanksBeat(vec![stored(0, 1), stored(1, 3)]));
    assert_eq!(told(&scene), (Some(4), Some(5)));
    // One that begins again tells what was stored before it did.
    scene.at(400, Event::RanksBeat(vec![stored(0, 0)]));
    assert_eq!(told(&scene), (Some(4), Some(5)));
    scene.take();
}

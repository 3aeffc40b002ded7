"""Views about the ads account, over the newest dump of its repository."""

from __future__ import annotations

from pipelines.views import View

ADS_ACCOUNT = View(
    name="ads_account",
    doc="each ad that is there, with what it is part of and what it shows, as the newest dump has them",
    sql="""
        SELECT a.ad_id, a.name AS ad_name, a.status AS ad_status, a.review_status, a.creative_type,
               a.ad_group_id, g.status AS ad_group_status, g.bid_usd_micros,
               g.campaign_id, c.name AS campaign_name, c.status AS campaign_status, c.objective,
               c.starts_at, c.ends_at, c.daily_budget_usd_micros,
               c.advertiser_id, v.name AS advertiser_name, v.status AS advertiser_status,
               a.pin_id, p.title, p.category, p.image_signature,
               coalesce(a.status = 'active' AND a.review_status = 'approved' AND g.status = 'active'
                        AND c.status = 'active' AND v.status = 'active', false) AS is_active
        FROM repo.ads AS a
        LEFT JOIN repo.ad_groups AS g ON g.ad_group_id = a.ad_group_id AND g.is_there
        LEFT JOIN repo.campaigns AS c ON c.campaign_id = g.campaign_id AND c.is_there
        LEFT JOIN repo.advertisers AS v ON v.advertiser_id = c.advertiser_id AND v.is_there
        LEFT JOIN repo.pins AS p ON p.pin_id = a.pin_id AND p.is_there
        WHERE a.is_there
    """,
    columns={
        "ad_id": "which ad",
        "ad_name": "what it is called",
        "ad_status": "whether it is meant to run",
        "review_status": "what the review said",
        "creative_type": "what kind of creative it is",
        "ad_group_id": "what it is part of",
        "ad_group_status": "null if the ad group is not there",
        "bid_usd_micros": "of the ad group, in micro-dollars",
        "campaign_id": "of the ad group",
        "campaign_name": "what it is called",
        "campaign_status": "null if the campaign is not there",
        "objective": "of the campaign",
        "starts_at": "from when on the campaign runs, UTC",
        "ends_at": "until when, UTC",
        "daily_budget_usd_micros": "of the campaign, in micro-dollars",
        "advertiser_id": "of the campaign",
        "advertiser_name": "what it is called",
        "advertiser_status": "null if the advertiser is not there",
        "pin_id": "what the ad shows",
        "title": "of the pin; null if it is not there",
        "category": "of the pin",
        "image_signature": "of the pin's image",
        "is_active": "whether all that it is part of is active, and its review approved, whatever the time",
    },
    examples=(
        "SELECT is_active, count(*) AS ads FROM explore.ads_account GROUP BY is_active ORDER BY is_active",
        "SELECT ad_id, campaign_id FROM explore.ads_account WHERE campaign_status IS NULL ORDER BY ad_id LIMIT 20",
    ),
)

CAMPAIGN_PERFORMANCE = View(
    name="campaign_performance",
    doc="what the ads of each campaign have done in the last seven days that were measured",
    sql="""
        SELECT c.campaign_id, c.name, c.status, c.daily_budget_usd_micros,
               count(a.ad_id) AS ads,
               coalesce(sum(a.impressions_7d), 0) AS impressions_7d,
               coalesce(sum(a.clicks_7d), 0) AS clicks_7d,
               coalesce(sum(a.conversions_7d), 0) AS conversions_7d,
               coalesce(sum(a.spend_7d_usd_micros), 0) AS spend_7d_usd_micros,
               coalesce(sum(a.revenue_7d_usd_micros), 0) AS revenue_7d_usd_micros,
               CAST(sum(a.clicks_7d) AS double) / nullif(sum(a.impressions_7d), 0) AS click_rate_7d,
               max(a.measured_at) AS measured_at
        FROM repo.campaigns AS c
        LEFT JOIN repo.ad_groups AS g ON g.campaign_id = c.campaign_id AND g.is_there
        LEFT JOIN repo.ads AS a ON a.ad_group_id = g.ad_group_id AND a.is_there
        WHERE c.is_there
        GROUP BY c.campaign_id, c.name, c.status, c.daily_budget_usd_micros
    """,
    columns={
        "campaign_id": "which campaign",
        "name": "what it is called",
        "status": "whether it is meant to run",
        "daily_budget_usd_micros": "what it may spend in a day, in micro-dollars",
        "ads": "how many it has",
        "impressions_7d": "of its ads, in seven days",
        "clicks_7d": "of its ads, in seven days",
        "conversions_7d": "of its ads, in seven days",
        "spend_7d_usd_micros": "of its ads, in seven days, in micro-dollars",
        "revenue_7d_usd_micros": "of its ads, in seven days, in micro-dollars",
        "click_rate_7d": "clicks an impression; null without impressions",
        "measured_at": "until when the newest of its ads was measured, UTC",
    },
    examples=(
        "SELECT campaign_id, ads, impressions_7d, click_rate_7d FROM explore.campaign_performance"
        " ORDER BY impressions_7d DESC, campaign_id LIMIT 10",
    ),
)

VIEWS = (ADS_ACCOUNT, CAMPAIGN_PERFORMANCE)
